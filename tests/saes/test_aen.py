from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, StandardSAE, TrainingSAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from torch.testing import assert_close

import aen_lightning
from aen_lightning import AENSAE, AENSAEConfig, AENTrainingSAE, AENTrainingSAEConfig
from tests.support.oracle import Oracle
from tests.support.training import step_input


def make_sae(**overrides: Any) -> AENTrainingSAE:
    fields: dict[str, Any] = {
        "d_in": 8,
        "d_sae": 24,
        "warmup_delay_steps": 2,
        "warmup_ramp_steps": 4,
        "ema_decay": 0.9,
    }
    torch.manual_seed(overrides.pop("seed", 0))
    return AENTrainingSAE(AENTrainingSAEConfig(**{**fields, **overrides}))


# --- the method -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparse_step": "off"},
        {"starvation_guard": 0.9},
        {"penalty": "mcp", "starvation_guard": 0.9},
        {"penalty": "mcp", "sparse_step": "off"},
        {"penalty": "scad", "penalty_shape": 3.7},
        {"penalty": "log", "penalty_shape": 1.0},
        {"remove_radial_gradient": True},
        {"remove_radial_gradient": True, "sparse_step": "off"},
    ],
    ids=str,
)
def test_sixty_float64_steps_equal_a_hand_written_oracle(apply_b_dec_to_input: bool, options: dict[str, Any]):
    torch.manual_seed(0)
    cfg = AENTrainingSAEConfig(
        d_in=12,
        d_sae=40,
        dtype="float64",
        l1_coefficient=0.7,
        l2_coefficient=0.05,
        gamma=0.5,
        ema_decay=0.95,
        reference_fraction=0.1,
        warmup_delay_steps=20,
        warmup_ramp_steps=25,
        l1_warmup_steps=10,
        guard_decay=0.8,
        guard_min=0.3,
        apply_b_dec_to_input=apply_b_dec_to_input,
        **options,
    )
    sae = AENTrainingSAE(cfg)
    oracle = Oracle(sae, cfg)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for n in range(60):
        x = 2 * torch.randn(32, 12, dtype=torch.float64) + 0.3
        l1 = cfg.l1_coefficient * min(1, n / cfg.l1_warmup_steps)
        expected = oracle.step(x, l1=l1, l2=cfg.l2_coefficient, lr=1e-2)
        output = sae.training_forward_pass(step_input(x, n, l1, cfg.l2_coefficient))
        assert abs(output.loss.item() - expected) <= 1e-12 * max(1.0, abs(expected)), f"step {n}"
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert sae.ramp.item() == 1.0
    assert sae.l1_weights.std() > 0.1, (
        "the adaptive weights must have come into play for the comparison to mean anything"
    )
    assert_close(sae.feature_acts_ema, oracle.m, rtol=1e-12, atol=1e-14)
    if cfg.penalty != "l1":
        assert_close(sae.activation_scale, oracle.tau, rtol=1e-12, atol=0)
        assert output.metrics["coding_convexity"]() > 0
    if cfg.starvation_guard:
        assert 0 < output.metrics["guarded_share"]() < 1
    else:
        assert "firing_rate_ema" not in sae.state_dict()


def test_family_gamma_zero_is_the_elastic_net_and_without_l2_the_standard_l1_sae():
    sae = make_sae(gamma=0.0, warmup_delay_steps=0, dtype="float64")
    sae.feature_acts_ema.copy_(torch.rand(24))
    standard = TrainingSAE.from_dict({"architecture": "standard", "d_in": 8, "d_sae": 24, "dtype": "float64"})
    sae.normalize_decoder()
    standard.load_state_dict({k: v for k, v in sae.state_dict().items() if k in standard.state_dict()})
    x = torch.randn(16, 8, dtype=torch.float64)
    ours = sae.training_forward_pass(step_input(x, l1=0.5, l2=0.0))
    theirs = standard.training_forward_pass(
        step_input(x, l1=0.5)
    )  # SAELens's own L1 SAE; decoder rows have norm 1
    assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=0)
    assert_close(sae.l1_weights, torch.ones(24, dtype=torch.float64))


def test_evaluating_never_changes_state():
    sae = make_sae()
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    x = torch.randn(16, 8)
    sae(x)
    acts, hidden_pre = sae.encode_with_hidden_pre(x)
    sae.calculate_aux_loss(step_input(x), acts, hidden_pre, sae.decode(acts))
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("sparse_step", ["off", "on"])
def test_a_training_forward_pass_in_eval_mode_changes_no_state_and_gives_the_same_loss(sparse_step: str):
    sae = make_sae(
        sparse_step=sparse_step, starvation_guard=0.1, dtype="float64", warmup_delay_steps=0, d_sae=200
    )
    with torch.no_grad():
        sae.b_enc.fill_(-1.5)
    x = torch.randn(64, 8, dtype=torch.float64)
    sae.training_forward_pass(step_input(x))
    before = {k: v.clone() for k, v in sae.state_dict().items()}
    sae.eval()
    evaluated = [sae.training_forward_pass(step_input(x, n)).loss for n in range(1, 4)]
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name]), name
    acts = sae.encode(x)
    by_hand = (
        (x - sae.decode(acts)).square().sum(-1) + 0.5 * acts @ sae.l1_weights + 0.1 * acts.square().sum(-1)
    )
    assert_close(torch.stack(evaluated), by_hand.mean().expand(3))


def test_training_forward_pass_follows_the_schedule_of_the_config():
    sae = make_sae(warmup_delay_steps=2, warmup_ramp_steps=4)
    x = torch.randn(16, 8)
    ramps = [sae.training_forward_pass(step_input(x, n)) and sae.ramp.item() for n in range(7)]
    # training step t = n + 1: 0 up to the delay, then (t - 2) / 4
    assert ramps == [0, 0, 0.25, 0.5, 0.75, 1, 1]


def test_decoder_rows_have_unit_norm_before_each_forward_and_on_export(tmp_path: Path):
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.training_forward_pass(step_input(torch.randn(4, 8)))
    assert_close(sae.W_dec.norm(dim=-1), torch.ones(24))
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.save_inference_model(tmp_path)
    assert_close(SAE.load_from_disk(tmp_path).W_dec.norm(dim=-1), torch.ones(24))
    assert_close(sae.W_dec.norm(dim=-1), torch.full((24,), 3.0)), "export leaves the SAE alone"


def test_export_after_an_unprojected_step_keeps_the_function(tmp_path: Path):
    sae = make_sae(dtype="float64")
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(24, 1) + 0.5)
    x = torch.randn(16, 8, dtype=torch.float64)
    out = sae(x)
    sae.save_inference_model(tmp_path)
    read = SAE.load_from_disk(tmp_path, dtype="float64")
    assert_close(read(x), out, rtol=1e-6, atol=1e-7)  # the file holds float32 where SAELens saves it so
    assert_close(read.W_dec.norm(dim=-1), torch.ones(24, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert torch.equal(sae(x), out)


def test_published_initialisation_is_torchs_linear():
    sae = make_sae(d_in=64, d_sae=256)
    bound = 64**-0.5
    assert sae.W_enc.abs().max() <= bound
    assert sae.W_enc.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert 0 < sae.b_enc.abs().max() <= bound
    cosine = torch.nn.functional.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=-1)
    assert cosine.abs().mean() < 0.2, "encoder and decoder start independent"


def test_tied_initialisation_of_saelens():
    sae = make_sae(decoder_init_norm=0.1)
    assert_close(sae.W_enc.T, 0.1 * sae.W_dec)
    assert_close(sae.W_dec.norm(dim=-1), torch.ones(24))


def test_micro_batches_keep_the_half_life_in_training_steps():
    whole, parts = make_sae(starvation_guard=0.1), make_sae(starvation_guard=0.1)
    mean, rates = torch.rand(24), torch.rand(24)
    whole.observe(mean, rates)
    for _ in range(4):
        parts.observe(mean, rates, n_micro_batches=4)
    assert_close(parts.feature_acts_ema, whole.feature_acts_ema)
    assert_close(parts.firing_rate_ema, whole.firing_rate_ema)


# --- precision --------------------------------------------------------------------------------------------
def test_statistics_stay_in_float32_when_the_sae_is_half_precision():
    sae = make_sae()
    sae.feature_acts_ema.fill_(1.0001)  # not a bfloat16 number
    sae.to(dtype=torch.bfloat16)
    assert sae.W_enc.dtype == torch.bfloat16
    assert sae.feature_acts_ema.dtype == torch.float32
    assert sae.feature_acts_ema[0].item() == pytest.approx(1.0001, abs=1e-7)
    sae.training_forward_pass(step_input(torch.randn(16, 8, dtype=torch.bfloat16)))
    assert sae.feature_acts_ema.dtype == sae.l1_weights.dtype == torch.float32


def test_float64_sae_keeps_float64_statistics():
    sae = make_sae(dtype="float64")
    sae.training_forward_pass(step_input(torch.randn(16, 8, dtype=torch.float64)))
    assert sae.feature_acts_ema.dtype == sae.l1_weights.dtype == torch.float64


# --- doors of SAELens -------------------------------------------------------------------------------------
def test_registered_under_its_string():
    assert isinstance(TrainingSAE.from_dict({"architecture": "aen", "d_in": 4, "d_sae": 8}), AENTrainingSAE)
    assert isinstance(SAE.from_dict({"architecture": "aen", "d_in": 4, "d_sae": 8}), AENSAE)


def test_importing_and_reloading_twice_is_harmless():
    importlib.reload(aen_lightning)
    importlib.reload(aen_lightning.saes.aen)
    importlib.reload(aen_lightning)
    assert SAE_TRAINING_CLASS_REGISTRY["aen"][0].__name__ == "AENTrainingSAE"
    assert SAE_CLASS_REGISTRY["aen"][1].architecture() == "aen"
    # put back the classes that the other tests have imported
    SAE_TRAINING_CLASS_REGISTRY["aen"] = (AENTrainingSAE, AENTrainingSAEConfig)
    SAE_CLASS_REGISTRY["aen"] = (AENSAE, AENSAEConfig)


@pytest.mark.parametrize(("asked", "loaded"), [("standard", StandardSAE), ("aen", AENSAE)])
def test_exported_for_inference_under_either_name_with_identical_outputs(
    tmp_path: Path, asked: str, loaded: type
):
    sae = make_sae(inference_architecture=asked)
    sae.save_inference_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["architecture"] == asked
    assert cfg["metadata"]["training_architecture"] == "aen"
    assert cfg["metadata"]["training_architecture_details"]["gamma"] == 0.5
    read = SAE.load_from_disk(tmp_path)
    assert type(read) is loaded
    x = torch.randn(16, 8)
    assert torch.equal(read.encode(x), sae.encode(x))
    assert torch.equal(read(x), sae(x))


@pytest.mark.parametrize("starvation_guard", [0.0, 0.1])
def test_saved_training_sae_keeps_its_adaptive_state(tmp_path: Path, starvation_guard: float):
    sae = make_sae(starvation_guard=starvation_guard)
    for n in range(5):
        sae.training_forward_pass(step_input(torch.randn(16, 8), n))
    sae.save_model(tmp_path)
    read = TrainingSAE.load_from_disk(tmp_path)
    assert isinstance(read, AENTrainingSAE)
    for name, value in sae.state_dict().items():
        assert_close(read.state_dict()[name], value, msg=name)
    assert read.n_observed_steps.item() == 5
    assert read.n_observed_steps.dtype == torch.int64


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_folding_an_average_scale_keeps_activations_and_outputs(tmp_path: Path, factor: float):
    sae = make_sae()
    x = torch.randn(16, 8)
    acts, out = sae.encode(x * factor), sae(x * factor) / factor
    sae.fold_activation_norm_scaling_factor(factor)
    assert_close(sae.encode(x), acts)
    assert_close(sae(x), out)
    sae.save_inference_model(tmp_path)
    assert_close(SAE.load_from_disk(tmp_path)(x), out)
    sae.normalize_decoder()
    assert_close(sae(x), out), "training on must not undo the fold"


def test_fold_W_dec_norm_keeps_the_function_and_the_adaptive_weights():
    sae = make_sae()
    sae.fold_activation_norm_scaling_factor(0.5)
    x = torch.randn(16, 8)
    sae.feature_acts_ema.copy_(sae.encode(x).mean(0))
    out = sae(x)
    sae.fold_W_dec_norm()
    assert_close(sae(x), out)
    assert_close(sae.W_dec.norm(dim=-1), torch.ones(24))
    assert_close(sae.feature_acts_ema, sae.encode(x).mean(0))


def test_constant_norm_rescale_takes_and_returns_raw_activations():
    plain = make_sae()
    scaled = make_sae(normalize_activations="constant_norm_rescale")
    scaled.load_state_dict(plain.state_dict())
    x = 100 * torch.randn(16, 8)
    norm = x.norm(dim=-1, keepdim=True)
    assert_close(scaled(x), plain(x * 8**0.5 / norm) * norm / 8**0.5)


def test_a_training_folder_loads_for_inference(tmp_path: Path):
    sae = make_sae(starvation_guard=0.1, penalty="mcp")
    for n in range(3):
        sae.training_forward_pass(step_input(torch.randn(16, 8), n))
    sae.save_model(tmp_path)
    read = SAE.load_from_disk(tmp_path)
    x = torch.randn(16, 8)
    assert torch.equal(read(x), sae(x))


def test_training_goes_on_from_a_folder_without_the_state_it_needs(tmp_path: Path):
    make_sae().save_model(tmp_path / "before")  # neither firing rates nor an activation scale
    cfg = json.loads((tmp_path / "before" / "cfg.json").read_text())
    cfg |= {"starvation_guard": 0.1, "penalty": "mcp"}
    (tmp_path / "before" / "cfg.json").write_text(json.dumps(cfg))
    resumed = TrainingSAE.load_from_disk(tmp_path / "before")
    assert torch.equal(resumed.firing_rate_ema, torch.zeros(24))
    exported = make_sae(inference_architecture="aen")
    exported.save_inference_model(tmp_path / "exported")
    again = TrainingSAE.load_from_disk(tmp_path / "exported")
    assert isinstance(again, AENTrainingSAE)
    x = torch.randn(16, 8)
    assert torch.equal(again(x), exported(x))
    assert torch.equal(again.feature_acts_ema, torch.ones(24))


def test_batches_of_contexts_are_batches_of_tokens():
    flat, nested = make_sae(starvation_guard=0.1), make_sae(starvation_guard=0.1)
    x = torch.randn(4, 6, 8)
    a = flat.training_forward_pass(step_input(x.flatten(0, 1)))
    b = nested.training_forward_pass(step_input(x))
    assert b.sae_out.shape == x.shape
    assert_close(a.loss, b.loss)
    for name, value in flat.state_dict().items():
        assert_close(nested.state_dict()[name], value, msg=name)


def test_without_a_coefficient_for_l2_the_configs_counts():
    sae = make_sae(l2_coefficient=0.1)
    x = torch.randn(16, 8)
    given, left_out = step_input(x, l2=0.1), step_input(x)
    del left_out.coefficients["l2"]
    sae.eval()
    assert torch.equal(sae.training_forward_pass(given).loss, sae.training_forward_pass(left_out).loss)


# --- config -----------------------------------------------------------------------------------------------
def test_defaults_are_those_published_for_pythia():
    cfg = AENTrainingSAEConfig.from_paper(d_in=512, d_sae=4096, lambda_1=1e-3, lambda_2=5e-4)
    assert cfg == replace(AENTrainingSAEConfig(d_in=512, d_sae=4096), metadata=cfg.metadata)
    assert (cfg.gamma, cfg.ema_decay, cfg.weight_min, cfg.weight_max) == (0.5, 0.9999, 0.01, 10.0)
    assert (cfg.warmup_delay_steps, cfg.warmup_ramp_steps, cfg.reference_fraction) == (4000, 2000, 0.05)


def test_from_paper_refuses_both_forms_at_once():
    with pytest.raises(
        TypeError, match="from_paper sets l1_coefficient from the lambdas; got l1_coefficient=3"
    ):
        AENTrainingSAEConfig.from_paper(d_in=4, d_sae=8, lambda_1=1e-3, lambda_2=0.0, l1_coefficient=3)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("l1_coefficient", -1.0, "a finite number >= 0"),
        ("l1_coefficient", float("nan"), "a finite number >= 0"),
        ("l2_coefficient", float("inf"), "a finite number >= 0"),
        ("gamma", -0.5, "a finite number >= 0"),
        ("gamma", "0.5", "a finite number >= 0"),
        ("ema_decay", 1.0, r"in \[0, 1\)"),
        ("weight_min", 0.0, r"in \(0, 1\]"),
        ("weight_min", 1.5, r"in \(0, 1\]"),
        ("weight_max", 0.5, "a finite number >= 1"),
        ("reference_fraction", 0.0, r"in \(0, 1\]"),
        ("warmup_delay_steps", 1.5, "an integer number of steps, or a share of .*"),
        ("warmup_ramp_steps", -1, "an integer number of steps >= 0, or .*"),
        ("l1_warmup_steps", -1, "an integer number of steps >= 0, or .*"),
        ("starvation_guard", -0.1, "a finite number >= 0"),
        ("penalty", "l2", "one of l1, mcp, scad, log"),
        ("penalty_shape", 0.0, "a finite number > 1 for scad, > 0 else"),
        ("remove_radial_gradient", 1, "true or false"),
        ("guard_min", 0.0, r"in \(0, 1\]"),
        ("guard_decay", 1.0, r"in \[0, 1\)"),
        ("decoder_init_norm", 0.0, "None or a number > 0"),
        ("inference_architecture", "topk", "'standard' or 'aen'"),
        ("d_in", 0, "a positive integer"),
        ("d_sae", 2.5, "a positive integer"),
    ],
)
def test_every_value_is_validated_by_name(name: str, value: Any, expected: str):
    fields = {"d_in": 8, "d_sae": 16, name: value}
    with pytest.raises(ValueError, match=rf"AENTrainingSAEConfig\.{name} must be {expected}, got "):
        AENTrainingSAEConfig(**fields)


# --- the step on the non-zeros ----------------------------------------------------------------------------
def sparse_and_dense(**overrides: Any) -> tuple[AENTrainingSAE, AENTrainingSAE]:
    fields: dict[str, Any] = {"d_in": 16, "d_sae": 400, "dtype": "float64", **overrides}
    dense, quick = make_sae(**fields, sparse_step="off"), make_sae(**fields, sparse_step="on")
    for sae in (dense, quick):
        with torch.no_grad():
            sae.b_enc.fill_(-1.5)  # a few per cent of the features fire
    return dense, quick


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"starvation_guard": 0.5},
        {"penalty": "mcp"},
        {"penalty": "scad", "penalty_shape": 3.7, "starvation_guard": 0.5},
        {"penalty": "log", "remove_radial_gradient": True},
    ],
    ids=str,
)
def test_sparse_steps_are_the_dense_steps(apply_b_dec_to_input: bool, options: dict[str, Any]):
    dense, quick = sparse_and_dense(apply_b_dec_to_input=apply_b_dec_to_input, **options)
    optimizers = [torch.optim.Adam(sae.parameters(), lr=1e-3) for sae in (dense, quick)]
    n_sparse = 0
    for n in range(30):
        x = torch.randn(64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        a, b = (sae.training_forward_pass(step_input(x, n, l2=0.2)) for sae in (dense, quick))
        n_sparse += b.feature_acts.is_sparse
        assert_close(b.loss, a.loss, rtol=1e-12, atol=0)
        for name, loss in a.losses.items():
            assert_close(b.losses[name], loss, rtol=1e-11, atol=1e-14)
        assert_close(b.feature_acts.to_dense(), a.feature_acts)
        assert_close(b.sae_out, a.sae_out)
        for output, optimizer in zip((a, b), optimizers, strict=True):
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
    assert n_sparse >= 25, "the sparse path must have been taken"
    for name, value in dense.state_dict().items():
        assert_close(quick.state_dict()[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_sparse_step_gives_way_to_whatever_needs_the_dense_activations():
    _, quick = sparse_and_dense(dtype="float32")
    x = torch.randn(32, 16)
    for n in range(2):
        output = quick.training_forward_pass(step_input(x, n))
    assert output.feature_acts.is_sparse
    seen = []
    quick.hook_sae_acts_post.add_hook(lambda acts, hook: seen.append(acts.shape))
    assert not quick.training_forward_pass(step_input(x)).feature_acts.is_sparse
    assert seen == [(32, 400)]
    quick.reset_hooks()
    assert quick.training_forward_pass(step_input(x)).feature_acts.is_sparse
    quick.to(dtype=torch.bfloat16)
    assert not quick.training_forward_pass(step_input(x.bfloat16())).feature_acts.is_sparse


def test_sparse_step_is_dense_while_the_code_is():
    sae = make_sae(d_sae=400, sparse_step="on")
    outputs = [sae.training_forward_pass(step_input(torch.randn(32, 8), n)) for n in range(3)]
    assert not any(output.feature_acts.is_sparse for output in outputs)
