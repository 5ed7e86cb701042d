from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sae_lens import SAE, SAETrainer, StandardSAE, TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from safetensors.torch import load_file
from torch.testing import assert_close

from aen_lightning import AENTrainingSAEConfig
from aen_lightning.callbacks import DeadFeatureTracker, DelayedWarmup, EMAWeightRefresh
from aen_lightning.saes.input_scaling import InputScaling
from aen_lightning.training.module import SAEModule
from tests.support.streams import Batches, batch_at, loader
from tests.support.training import SAE_FIELDS, make_trainer, step_input


def make_module(seed: int = 0, sae: dict[str, Any] | None = None, **kwargs: Any) -> SAEModule:
    torch.manual_seed(seed)
    return SAEModule({**SAE_FIELDS, **(sae or {})}, **kwargs)


def saelens_fit(module: SAEModule, n_steps: int, **overrides: Any) -> TrainingSAE[Any]:
    """SAELens's own trainer on the same stream, from the same start."""
    sae = TrainingSAE.from_dict(module.sae.cfg.to_dict())
    sae.load_state_dict(module.sae.state_dict())
    fields: dict[str, Any] = {
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "save_final_checkpoint": False,
        "total_training_samples": 64 * n_steps,
        "device": "cpu",
        "autocast": False,
        "lr": 1e-3,
        "lr_end": 1e-4,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "lr_decay_steps": 0,
        "n_restart_cycles": 1,
        "train_batch_size_samples": 64,
        "dead_feature_window": 1000,
        "feature_sampling_window": 2000,
        "logger": LoggingConfig(log_to_wandb=False),
        "n_batches_for_norm_estimate": 1,
    }
    trainer = SAETrainer(SAETrainerConfig(**{**fields, **overrides}), sae, iter(Batches(64, 16)))
    return trainer.fit()


@pytest.mark.parametrize(
    ("sae", "schedule"),
    [
        ({}, {}),
        ({"starvation_guard": 0.9}, {}),
        ({}, {"lr_warm_up_steps": 20, "lr_decay_steps": 50}),
        ({}, {"lr_scheduler_name": "cosineannealing", "lr_end": 1e-4}),
    ],
)
def test_two_hundred_steps_end_where_saelens_own_trainer_ends(
    tmp_path: Path, sae: dict[str, Any], schedule: dict[str, Any]
):
    module = make_module(sae=sae, **schedule)
    theirs = saelens_fit(module, 200, **{"lr_end": 1e-4, **schedule})
    make_trainer(tmp_path, 200).fit(module, loader())
    theirs.normalize_decoder()  # SAELens's trainer projects before a forward, Lightning after a step
    assert module.sae.l1_weights.std() > 0.05, (
        "the adaptive weights must be at work for the comparison to mean anything"
    )
    for name, value in module.sae.state_dict().items():
        assert_close(value, theirs.state_dict()[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "sae",
    [
        {"architecture": "standard", "l1_coefficient": 0.1},
        {"architecture": "topk", "k": 4},
        {"architecture": "batchtopk", "k": 4},
        {"architecture": "jumprelu"},
        {"architecture": "gated"},
        {"architecture": "matryoshka_batchtopk", "k": 4, "matryoshka_widths": [16, 48]},
    ],
    ids=lambda sae: sae["architecture"],
)
def test_other_architectures_take_saelens_steps_in_the_same_loop(tmp_path: Path, sae: dict[str, Any]):
    torch.manual_seed(0)
    module = SAEModule({"d_in": 16, "d_sae": 48, **sae}, dead_feature_window=10)
    theirs = saelens_fit(module, 40, dead_feature_window=10)
    make_trainer(tmp_path, 40).fit(module, loader())
    for name, value in module.sae.state_dict().items():
        assert_close(value, theirs.state_dict()[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_resumed_from_a_checkpoint_it_ends_where_an_uninterrupted_run_ends(tmp_path: Path):
    whole = make_module()
    make_trainer(tmp_path, 60, callbacks=[DeadFeatureTracker(window_steps=25)]).fit(whole, loader())

    first = make_module()
    checkpoint = ModelCheckpoint(tmp_path, filename="at30", every_n_train_steps=30)
    trainer = make_trainer(
        tmp_path, 30, enable_checkpointing=True, callbacks=[checkpoint, DeadFeatureTracker(window_steps=25)]
    )
    trainer.fit(first, loader())
    second = make_module(seed=7)
    tracker = DeadFeatureTracker(window_steps=25)
    trainer = make_trainer(tmp_path, 60, callbacks=[tracker])
    trainer.fit(second, loader(start=30), ckpt_path=tmp_path / "at30.ckpt", weights_only=True)

    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert second.n_training_samples == whole.n_training_samples == 60 * 64
    # windows closed at 25 and 50; the present one has seen steps 51 to 60
    assert tracker.state_dict()["windows"][""]["n_tokens"] == 10 * 64


def test_checkpoint_loads_with_weights_only_and_knows_its_scaling(tmp_path: Path):
    module = make_module()
    module.input_scaling = InputScaling("average", 0.5)
    trainer = make_trainer(tmp_path, 2)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    read = SAEModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert read.input_scaling == InputScaling("average", 0.5)
    assert torch.equal(read.sae.W_enc, module.sae.W_enc)


def test_every_checkpoint_and_the_end_leave_a_folder_that_saelens_reads(tmp_path: Path):
    module = make_module()
    logger = CSVLogger(tmp_path, name="run")
    trainer = make_trainer(
        tmp_path,
        40,
        logger=logger,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(every_n_train_steps=20, save_top_k=-1)],
    )
    trainer.fit(module, loader())
    folder = Path(logger.log_dir) / "sae"
    assert sorted(p.name for p in folder.iterdir()) == ["final", "step_20", "step_40"]
    x = batch_at(999, batch_size=32, d_in=16)
    final = SAE.load_from_disk(folder / "final")
    assert type(final) is StandardSAE
    assert torch.equal(final(x), module.sae(x))
    assert not torch.equal(SAE.load_from_disk(folder / "step_20")(x), module.sae(x))
    acts = torch.cat([module.sae.encode(batch_at(i, batch_size=64, d_in=16)) for i in range(40)])
    sparsity = load_file(folder / "final" / "sparsity.safetensors")["sparsity"]
    assert sparsity.shape == (48,)
    rate = (acts > 0).float().mean(0)
    # measured while training, so only roughly the rate of the final dictionary
    assert torch.corrcoef(torch.stack([sparsity, torch.log10(rate + 1e-10)]))[0, 1] > 0.8


@pytest.mark.parametrize("kind", ["per_token", "average"])
def test_exported_dictionary_takes_and_returns_raw_activations(tmp_path: Path, kind: str):
    scaling = InputScaling(kind, 0.25 if kind == "average" else None)  # type: ignore[arg-type]
    module = make_module()
    make_trainer(tmp_path, 20).fit(module, loader())
    module.input_scaling = scaling
    raw = 7 * batch_at(3, batch_size=32, d_in=16)
    factor = 0.25 if kind == "average" else 4 / raw.norm(dim=-1, keepdim=True)  # sqrt(16) = 4
    before = {k: v.clone() for k, v in module.state_dict().items()}
    read = SAE.load_from_disk(module.export(tmp_path / "sae"))
    assert_close(read(raw), module.sae(raw * factor) / factor)
    assert read.cfg.normalize_activations == ("none" if kind == "average" else "constant_norm_rescale")
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items()), (
        "exporting must not change the module"
    )
    assert module.sae.cfg.normalize_activations == "none"


def test_log_keys_follow_saelens_and_csv_has_them(tmp_path: Path):
    logger = CSVLogger(tmp_path, name="run")
    trainer = make_trainer(
        tmp_path, 30, logger=logger, log_every_n_steps=10, callbacks=[DeadFeatureTracker(window_steps=10)]
    )
    trainer.fit(make_module(), loader())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = {
        "losses/overall_loss", "losses/mse_loss", "losses/l1_loss", "losses/l2_loss", "metrics/l0",
        "metrics/explained_variance", "sparsity/dead_features", "sparsity/mean_passes_since_fired",
        "details/current_learning_rate", "details/n_training_samples", "details/l1_coefficient",
        "metrics/mean_log10_feature_sparsity", "sparsity/dead_features_window_pct", "sparsity/recovery_rate",
        "details/tokens_per_second",
    }  # fmt: skip
    assert expected <= set(rows[0])
    logged = [row for row in rows if row["details/n_training_samples"]]
    assert [float(row["details/n_training_samples"]) for row in logged] == [640, 1280, 1920]
    # the L1 term's warm-up over 30 steps: 9/30, 19/30, 29/30 of 0.05 at the tenth, twentieth, thirtieth step
    assert [float(row["details/l1_coefficient"]) for row in logged] == pytest.approx(
        [0.015, 0.05 * 19 / 30, 0.05 * 29 / 30]
    )


def test_validation_metrics_equal_one_pass_over_the_split_and_change_nothing(tmp_path: Path):
    module = make_module()
    batches = [batch_at(i, batch_size=50, d_in=16, seed=0) for i in (100, 101, 102)]
    trainer = make_trainer(tmp_path, 10)
    trainer.fit(module, loader())
    before = {k: v.clone() for k, v in module.sae.state_dict().items()}
    (logged,) = trainer.validate(module, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    assert all(torch.equal(v, before[k]) for k, v in module.sae.state_dict().items())
    x = torch.cat(batches).double()
    with torch.no_grad():
        acts = module.sae.encode(torch.cat(batches))
        x_hat = module.sae.decode(acts).double()
    error = x - x_hat
    ev = 1 - error.var(0, correction=0).sum() / x.var(0, correction=0).sum()
    assert logged["val/metrics/l0"] == pytest.approx((acts > 0).sum().item() / 150)
    assert logged["val/metrics/explained_variance"] == pytest.approx(ev.item(), abs=1e-6)
    assert logged["val/metrics/mse"] == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert logged["val/metrics/shrinkage_ratio"] == pytest.approx(
        (x_hat.abs().sum() / x.abs().sum()).item(), rel=1e-5
    )
    assert logged["val/metrics/dead_features_pct"] == pytest.approx(
        100 * (acts.sum(0) == 0).double().mean().item()
    )


def test_a_fit_may_follow_a_validation(tmp_path: Path):
    module, trainer = make_module(), make_trainer(tmp_path, 4, val_check_interval=2)
    held_out = torch.utils.data.DataLoader([batch_at(100, batch_size=64, d_in=16)], batch_size=None)  # type: ignore[arg-type]
    (before,) = trainer.validate(module, held_out, verbose=False)
    trainer.fit(module, loader(), held_out)
    assert trainer.callback_metrics["val/metrics/mse"] < before["val/metrics/mse"]


def test_a_callback_given_to_the_trainer_takes_the_place_of_the_default(tmp_path: Path):
    mine = DelayedWarmup(delay_steps=5, ramp_steps=10)
    trainer = make_trainer(tmp_path, 12, callbacks=[mine])
    module = make_module()
    trainer.fit(module, loader())
    assert [c for c in trainer.callbacks if isinstance(c, DelayedWarmup)] == [mine]
    assert sum(isinstance(c, EMAWeightRefresh) for c in trainer.callbacks) == 1
    assert module.sae.ramp.item() == pytest.approx((12 - 5) / 10)


def test_weights_wait_for_their_refresh_while_the_means_move_on(tmp_path: Path):
    module = make_module(sae={"warmup_delay_steps": 0})
    seen: list[torch.Tensor] = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(torch.stack([module.sae.l1_weights.clone(), module.sae.feature_acts_ema.clone()]))

    make_trainer(tmp_path, 8, callbacks=[EMAWeightRefresh(every_n_steps=4), Spy()]).fit(module, loader())
    weights = [w for w, _ in seen]
    assert all(torch.equal(weights[i], weights[0]) for i in (1, 2, 3))
    assert not torch.equal(weights[4], weights[3])
    assert all(torch.equal(weights[i], weights[4]) for i in (5, 6, 7))
    assert not torch.equal(seen[1][1], seen[0][1])


def test_gradient_accumulation_counts_optimizer_steps(tmp_path: Path):
    module = make_module(sae={"warmup_delay_steps": 2, "warmup_ramp_steps": 8})
    make_trainer(tmp_path, 6, accumulate_grad_batches=3).fit(module, loader())
    assert module.sae.ramp.item() == pytest.approx((6 - 2) / 8)
    assert module.n_training_samples == 6 * 3 * 64


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains_and_keeps_its_statistics(tmp_path: Path, precision: Any):
    module = make_module()
    make_trainer(tmp_path, 60, precision=precision).fit(module, loader())
    assert module.sae.feature_acts_ema.dtype == torch.float32
    x = batch_at(500, batch_size=64, d_in=16)
    full = make_module()
    make_trainer(tmp_path, 60).fit(full, loader())
    mse = (module.sae(x.to(module.sae.dtype)).float() - x).square().mean()
    assert mse < 1.2 * (full.sae(x) - x).square().mean()


def test_compiled_training_takes_the_same_steps(tmp_path: Path):
    # aot_eager: inductor needs a C++ compiler, which a user's machine may lack
    module, plain = make_module(compile_sae=True, sae_compilation_backend="aot_eager"), make_module()
    make_trainer(tmp_path, 12).fit(module, loader())
    make_trainer(tmp_path, 12).fit(plain, loader())
    assert_close(module.sae.W_enc, plain.sae.W_enc, rtol=0, atol=1e-5)


def test_a_second_fit_compiles_nothing_again(tmp_path: Path):
    torch._dynamo.reset()
    module = make_module(compile_sae=True, sae_compilation_backend="aot_eager")
    make_trainer(tmp_path, 2).fit(module, loader())
    n_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert n_graphs > 0
    make_trainer(tmp_path, 2).fit(module, loader())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == n_graphs


class _Stops(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 7:
            raise RuntimeError("stopped on purpose")


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("options", [{}, {"compile_sae": True, "sae_compilation_backend": "aot_eager"}])
def test_after_a_fit_it_trains_under_saelens_as_if_lightning_had_never_been_there(
    tmp_path: Path, raises: bool, options: dict[str, Any]
):
    module = make_module(sae={"warmup_delay_steps": 2, "starvation_guard": 0.5}, **options)
    callbacks: list[pl.Callback] = [EMAWeightRefresh(every_n_steps=5), *([_Stops()] if raises else [])]
    trainer = make_trainer(tmp_path, 7, callbacks=callbacks, accumulate_grad_batches=2)
    if raises:
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer.fit(module, loader())
    else:
        trainer.fit(module, loader())
    assert module.sae.W_enc.is_contiguous()
    # a new SAE that holds the same numbers knows nothing of Lightning
    fresh = TrainingSAE.from_dict(module.sae.cfg.to_dict())
    fresh.load_state_dict(module.sae.state_dict())
    assert vars(module.sae).keys() == vars(fresh).keys()
    assert type(module.sae).training_forward_pass == type(fresh).training_forward_pass
    for n in range(12):
        outputs = [
            sae.training_forward_pass(step_input(batch_at(n, batch_size=64, d_in=16), n))
            for sae in (module.sae, fresh)
        ]
        assert torch.equal(outputs[0].loss, outputs[1].loss)
    for name, value in fresh.state_dict().items():
        assert torch.equal(module.sae.state_dict()[name], value), name


def test_optimizer_by_class_path():
    module = make_module(optimizer="torch.optim.AdamW", optimizer_kwargs={"weight_decay": 0.1})
    assert module.optimizer_settings.optimizer_class is torch.optim.AdamW


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"optimizer": "torch.optim.Adm"},
            "optimizer must be the class path of a torch optimizer .* got 'torch.optim.Adm'",
        ),
        ({"optimizer": "torch.nn.Linear"}, "'torch.nn.Linear' is not a torch.optim.Optimizer"),
        ({"optimizer_kwargs": {"beta": 1}}, "torch.optim.Adam takes no argument 'beta'"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"sae": {"gamam": 1.0}}, "no key 'gamam' for architecture 'aen' .did you mean 'gamma'.."),
        ({"sae": {"architecture": "ane"}}, "unknown SAE architecture 'ane' .did you mean 'aen'.."),
        ({"sae": {"lambda_1": 1e-3}}, "both lambda_1=0.001 and l1_coefficient=0.05"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_module(**kwargs)


def test_missing_width_is_named():
    with pytest.raises(ValueError, match="sae lacks d_sae"):
        SAEModule({"architecture": "aen", "d_in": 4})


def test_from_config_object():
    cfg = AENTrainingSAEConfig(d_in=8, d_sae=16, gamma=1.0)
    module = SAEModule.from_config(cfg, lr=1e-2)
    assert module.sae.cfg.gamma == 1.0
    assert module.hparams["lr"] == 1e-2


def test_resume_is_exact_on_the_sparse_step_too(tmp_path: Path):
    sae = {
        "d_sae": 600,
        "l1_coefficient": 0.3,
        "l1_warmup_steps": 0,
        "warmup_delay_steps": 5,
        "sparse_step": "on",
    }

    def start(seed: int = 0, **overrides: Any) -> SAEModule:
        module = make_module(seed, sae={**sae, **overrides})
        with torch.no_grad():
            module.sae.b_enc.fill_(-3.0)
        return module

    whole, first, second = start(), start(), start(seed=3)
    make_trainer(tmp_path, 60).fit(whole, loader())
    trainer = make_trainer(tmp_path, 47)
    trainer.fit(first, loader())
    assert first.sae.density_switch.sparse, "the run must have gone sparse for this to mean anything"
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    make_trainer(tmp_path, 60).fit(second, loader(start=47), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    dense = start(sparse_step="off")
    make_trainer(tmp_path, 60).fit(dense, loader())
    for name, value in whole.sae.state_dict().items():
        assert_close(
            value, dense.sae.state_dict()[name], rtol=0, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_three_dimensional_batches_are_refused(tmp_path: Path):
    data = torch.utils.data.DataLoader([torch.randn(2, 4, 16)], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(batch, d_in=16\), got \(2, 4, 16\)"):
        make_trainer(tmp_path, 1).fit(make_module(), data)


def test_adaptive_callbacks_refuse_an_architecture_without_adaptive_weights(tmp_path: Path):
    module = SAEModule({"architecture": "topk", "d_in": 16, "d_sae": 32, "k": 4})
    with pytest.raises(
        TypeError, match="DelayedWarmup schedules adaptive weights, which architecture 'topk' does not have"
    ):
        make_trainer(tmp_path, 1, callbacks=[DelayedWarmup()]).fit(module, loader())


def test_the_auxiliary_loss_has_a_window_of_its_own(tmp_path: Path):
    sae = {
        "architecture": "aen",
        "d_in": 16,
        "d_sae": 48,
        "aux_loss_coefficient": 1.0,
        "aux_loss_window": 0.1,
    }
    module = SAEModule(sae, dead_feature_window=1000, seed=0)
    make_trainer(tmp_path, 40).fit(module, loader())
    tracked = module.tracked[0]
    tracked.n_forward_passes_since_fired.copy_(torch.arange(48))
    assert tracked.revived_neuron_mask.tolist() == [n > 4 for n in range(48)]
    assert not tracked.dead_neuron_mask.any()
