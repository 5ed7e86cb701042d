"""SAELens's own doors, opened with the architecture `aen` on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    ActivationsStore,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    SAETransformerBridge,
    StandardSAE,
    TrainingSAE,
    run_evals,
)
from sae_lens.evals import EvalConfig
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file
from torch.testing import assert_close
from transformer_lens import HookedTransformerConfig

from aen_lightning import AENSAE, AENTrainingSAE, AENTrainingSAEConfig
from aen_lightning.cli.main import main
from tests.support.tiny_models import D_MODEL, save_tiny_model

HOOK = "model.layers.1"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    words = torch.randint(4, 64, (200, 40), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row.tolist()) for row in words]})


def aen_config(**overrides: Any) -> AENTrainingSAEConfig:
    fields: dict[str, Any] = {
        "d_in": D_MODEL, "d_sae": 48, "l1_coefficient": 0.1, "l2_coefficient": 0.01, "warmup_delay_steps": 5,
        "warmup_ramp_steps": 5, "ema_decay": 0.9,
    }  # fmt: skip
    return AENTrainingSAEConfig(**{**fields, **overrides})


def runner_config(model_path: str, tmp_path: Path, **overrides: Any) -> LanguageModelSAERunnerConfig[Any]:
    fields: dict[str, Any] = {
        "sae": aen_config(),
        "model_name": model_path,
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": HOOK,
        "context_size": 16,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 16,
        "train_batch_size_tokens": 64,
        "training_tokens": 64 * 20,
        "prepend_bos": False,
        "n_eval_batches": 1,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": str(tmp_path / "checkpoints"),
        "output_path": str(tmp_path / "output"),
        "verbose": False,
    }
    return LanguageModelSAERunnerConfig(**{**fields, **overrides})


def test_saelens_runner_trains_saves_and_resumes(model_path: str, dataset: Dataset, tmp_path: Path):
    cfg = runner_config(model_path, tmp_path, n_checkpoints=1, save_final_checkpoint=True)
    sae = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset).run()
    assert isinstance(sae, AENTrainingSAE)
    assert sae.n_observed_steps.item() == 20
    assert sae.ramp.item() == 1.0
    assert sae.l1_weights.std() > 0

    exported = SAE.load_from_disk(tmp_path / "output")
    assert type(exported) is StandardSAE
    x = torch.randn(8, D_MODEL)
    assert_close(exported(x), sae(x))
    metadata = json.loads((tmp_path / "output" / "cfg.json").read_text())["metadata"]
    assert metadata["training_architecture"] == "aen"
    assert metadata["hook_name"] == HOOK

    assert cfg.checkpoint_path is not None
    checkpoint = next(p for p in Path(cfg.checkpoint_path).iterdir() if not p.name.startswith("final"))
    resumed_cfg = runner_config(
        model_path,
        tmp_path,
        resume_from_checkpoint=str(checkpoint),
        training_tokens=64 * 30,
        output_path=None,
    )
    resumed = LanguageModelSAETrainingRunner(resumed_cfg, override_dataset=dataset).run()
    assert isinstance(resumed, AENTrainingSAE)
    assert resumed.n_observed_steps.item() == 30, "the step count goes on from the checkpoint"


def test_scaling_by_the_average_norm_is_folded_in(model_path: str, dataset: Dataset, tmp_path: Path):
    cfg = runner_config(
        model_path,
        tmp_path,
        sae=aen_config(normalize_activations="expected_average_only_in"),
        n_batches_for_norm_estimate=5,
    )
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset)
    sae = runner.run()
    acts = runner.activations_store.next_batch()
    exported = SAE.load_from_disk(tmp_path / "output")
    assert exported.cfg.normalize_activations == "none"
    assert_close(exported(acts), sae(acts), rtol=1e-4, atol=1e-4)
    ratio = exported(acts).norm() / acts.norm()
    assert 0.2 < ratio < 2, "outputs are in the raw activations' units"


def test_constant_norm_rescale_trains(model_path: str, dataset: Dataset, tmp_path: Path):
    cfg = runner_config(model_path, tmp_path, sae=aen_config(normalize_activations="constant_norm_rescale"))
    sae = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset).run()
    x = torch.randn(8, D_MODEL)
    assert_close(SAE.load_from_disk(tmp_path / "output")(3 * x), 3 * sae(x), rtol=1e-4, atol=1e-4)


def test_several_saes_in_saelens_multi_runner(model_path: str, dataset: Dataset, tmp_path: Path):
    cfg = MultiSAETrainingRunnerConfig(
        saes={"weak": aen_config(), "strong": aen_config(l1_coefficient=100.0)},
        hook_names=HOOK,
        model_name=model_path,
        model_class_name="AutoModelForCausalLM",
        context_size=16,
        store_batch_size_prompts=8,
        n_batches_in_buffer=16,
        train_batch_size_tokens=64,
        training_tokens=64 * 40,
        lr=1e-2,
        prepend_bos=False,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(tmp_path),
    )
    saes = MultiSAETrainingRunner(cfg, override_dataset=dataset).run()
    x = torch.randn(256, D_MODEL, generator=torch.Generator().manual_seed(0))
    weak, strong = ((sae.encode(x) > 0).float().sum(-1).mean() for sae in (saes["weak"], saes["strong"]))
    assert strong < 0.5 * weak  # the two were not given one and the same penalty
    for name, sae in saes.items():
        assert_close(SAE.load_from_disk(tmp_path / name)(x), sae(x))


def test_saelens_command_line_takes_the_architecture(model_path: str, dataset: Dataset, tmp_path: Path):
    dataset.to_parquet(tmp_path / "data" / "train.parquet")
    code = main(
        f"saelens --architecture aen --d_in {D_MODEL} --d_sae 32 --l1_coefficient 0.1 --gamma 0.9 "
        f"--model_name {model_path} "
        f"--model_class_name AutoModelForCausalLM --hook_name {HOOK} --dataset_path {tmp_path / 'data'} "
        "--streaming false "
        "--context_size 16 --store_batch_size_prompts 8 --n_batches_in_buffer 16 --train_batch_size_tokens "
        "64 "
        f"--training_tokens 640 --prepend_bos false --log_to_wandb false --output_path {tmp_path / 'out'} "
        f"--checkpoint_path {tmp_path / 'ckpt'}".split()
    )
    assert code == 0
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert cfg["d_sae"] == 32
    assert cfg["metadata"]["training_architecture_details"]["gamma"] == 0.9
    assert (10 ** load_file(tmp_path / "out" / "sparsity.safetensors")["sparsity"]).max() <= 1.001


@pytest.mark.parametrize("architecture", ["standard", "aen"])
def test_run_evals_on_an_exported_dictionary(
    model_path: str, dataset: Dataset, tmp_path: Path, architecture: str
):
    cfg = runner_config(model_path, tmp_path, sae=aen_config(inference_architecture=architecture))
    LanguageModelSAETrainingRunner(cfg, override_dataset=dataset).run()
    sae = SAE.load_from_disk(tmp_path / "output")
    assert type(sae) is (AENSAE if architecture == "aen" else StandardSAE)
    model = load_model("AutoModelForCausalLM", model_path, device="cpu", hook_names=[HOOK])
    store = ActivationsStore.from_sae(
        model, sae, dataset, streaming=False, store_batch_size_prompts=8, context_size=16
    )
    metrics, _ = run_evals(
        sae,
        store,
        model,
        ActivationScaler(),
        EvalConfig(
            batch_size_prompts=8,
            n_eval_reconstruction_batches=2,
            n_eval_sparsity_variance_batches=2,
            compute_ce_loss=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        ),
        exclude_special_tokens=False,
    )
    assert 0 < metrics["sparsity"]["l0"] <= 48
    assert -10 < metrics["reconstruction_quality"]["explained_variance"] < 1


def test_spliced_into_hooked_transformer_and_bridge(model_path: str):
    training = TrainingSAE.from_dict(
        {
            "architecture": "aen",
            "d_in": D_MODEL,
            "d_sae": 32,
            "metadata": {"hook_name": "blocks.0.hook_resid_post"},
        }
    )
    sae = AENSAE.from_dict({**training.cfg.get_inference_sae_cfg_dict(), "architecture": "aen"})
    sae.load_state_dict({k: v for k, v in training.state_dict().items() if k in sae.state_dict()})
    config = HookedTransformerConfig(
        n_layers=2,
        d_model=D_MODEL,
        n_ctx=16,
        d_head=8,
        n_heads=2,
        d_vocab=64,
        act_fn="relu",
        device="cpu",
        seed=0,
    )
    hooked = HookedSAETransformer(config)
    tokens = torch.randint(4, 64, (2, 10))
    _check_splice(hooked, sae, tokens)
    bridge = SAETransformerBridge.boot_transformers(model_path, device="cpu")
    _check_splice(bridge, sae, tokens, cached_as="blocks.0.hook_out")  # the bridge's own name for resid_post


def _check_splice(
    model: Any, sae: SAE[Any], tokens: torch.Tensor, cached_as: str = "blocks.0.hook_resid_post"
) -> None:
    clean, cache = model.run_with_cache(tokens)
    with torch.no_grad():
        expected = sae(cache[cached_as])
        spliced, sae_cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    output_names = [name for name in sae_cache if name.endswith("hook_sae_recons")]
    assert len(output_names) == 1
    assert_close(sae_cache[output_names[0]], expected)
    assert not torch.allclose(clean, spliced), "the reconstruction must reach the logits"
    model.add_sae(sae)
    assert_close(model(tokens), spliced)
    model.reset_saes()
    assert_close(model(tokens), clean)
