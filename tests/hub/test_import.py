from __future__ import annotations

import argparse
import json
import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardSAE, TopKSAE, TrainingSAE
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from aen_lightning.hub import authors_checkpoint_disk_loader, import_checkpoint, read_checkpoint
from tests.support.commands import import_command

D_IN, D_SAE = 6, 10
AEN = (
    "checkpoints/llama8b/regularization/seed0/adaptive_elastic_net/lambda1_0p002_lambda2_0p0001_gamma_0p5.pt"
)
TOPK = "checkpoints/llama8b/topk/seed0/k3_llm-topk_baseline_sweep000-seed0.pt"
L1 = "checkpoints/llama8b/regularization/seed0/l1/lambda1_0p002.pt"


def checkpoint(
    *, adaptive: bool = True, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> dict[str, Any]:
    """What the authors save (spec, section 8), with random weights."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    decoder = rand(D_IN, D_SAE)
    state: dict[str, Tensor] = {
        "b_dec": rand(D_IN) * 0.1,
        "encoder.weight": rand(D_SAE, D_IN),
        "encoder.bias": rand(D_SAE) * 0.1,
        "decoder.weight": decoder / decoder.norm(dim=0),
    }
    if adaptive:
        state |= {"ema_abs_activations": rand(D_SAE).abs(), "_step_count": torch.tensor(100_000)}
    return {
        "model_state_dict": state,
        "optimizer_state_dict": {
            "state": {0: {"exp_avg": rand(D_SAE, D_IN)}},
            "param_groups": [{"lr": 5e-4}],
        },
        "trainer_config": {"lr": 5e-4, "batch_size": 4096},
        "run_name": "a-run",
        "run_metadata": {"seed": 0},
        "metrics_history": [{"l0": 40.0}, {"l0": np.float64(33.5), "ev": 0.5, "loss": float("nan")}],
        **changes,
    }


def save(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def published_forward(content: dict[str, Any], x: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
    """The authors' formulas (spec, sections 1 and 4) in float64, in their own layout.

    Scale, encode, decode, unscale.
    """
    s = {name: t.double() for name, t in content["model_state_dict"].items()}
    norm = x.norm(dim=-1, keepdim=True)
    scaled = x * D_IN**0.5 / norm
    h = torch.nn.functional.linear(scaled - s["b_dec"], s["encoder.weight"], s["encoder.bias"]).relu()
    if k is not None:
        h = torch.stack([torch.where(row >= row.sort(descending=True).values[k - 1], row, 0.0) for row in h])
    x_hat = torch.nn.functional.linear(h, s["decoder.weight"]) + s["b_dec"]
    return h, x_hat * norm / D_IN**0.5


X = torch.randn(32, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 7


@pytest.mark.parametrize(
    ("name", "adaptive", "k", "sae_class"),
    [
        (AEN, True, None, StandardSAE),
        (L1, False, None, StandardSAE),
        ("checkpoints/llama8b/regularization/seed0/elastic_net/lambda1_0p002_lambda2_0p0001.pt", False, None, StandardSAE),
        ("checkpoints/llama8b/regularization/seed0/adaptive_lasso/lambda1_0p002_gamma_0p5.pt", True, None, StandardSAE),
        (TOPK, False, 3, TopKSAE),
    ],
)  # fmt: skip
def test_imported_dictionary_computes_the_authors_formulas(
    tmp_path: Path, name: str, adaptive: bool, k: int | None, sae_class: type
) -> None:
    content = checkpoint(adaptive=adaptive)
    folder = import_checkpoint(save(tmp_path, name, content), tmp_path / "out")
    sae = SAE.load_from_disk(folder, dtype="float64")
    assert isinstance(sae, sae_class)
    h, x_hat = published_forward(content, X, k)
    assert_close(sae.encode(X), h)
    assert_close(sae(X), x_hat)
    stored = load_file(folder / "sae_weights.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["W_enc"], content["model_state_dict"]["encoder.weight"].T)


def test_metadata_says_model_hook_settings_and_source(tmp_path: Path) -> None:
    folder = import_checkpoint(save(tmp_path, AEN, checkpoint()), tmp_path / "out")
    cfg = json.loads((folder / "cfg.json").read_text())
    m = cfg["metadata"]
    assert (m["model_name"], m["hook_name"], m["hf_hook_name"], m["context_size"], m["prepend_bos"]) == (
        "meta-llama/Llama-3.1-8B", "blocks.16.hook_resid_post", "model.layers.16", 128, False,
    )  # fmt: skip
    assert m["training_architecture"] == "aen"
    assert m["training_architecture_details"] == {
        "kind": "adaptive_elastic_net", "lambda_1": 0.002, "lambda_2": 0.0001, "gamma": 0.5,
    }  # fmt: skip
    assert m["imported_from"]["metrics"] == {"l0": 33.5, "ev": 0.5}
    assert str(tmp_path) not in json.dumps(cfg)


def test_adaptive_state_is_kept_beside_an_inference_dictionary(tmp_path: Path) -> None:
    content = checkpoint()
    folder = import_checkpoint(save(tmp_path, AEN, content), tmp_path / "out")
    state = load_file(folder / "adaptive_state.safetensors")
    assert torch.equal(state["feature_acts_ema"], content["model_state_dict"]["ema_abs_activations"].float())
    assert int(state["n_observed_steps"]) == 100_000
    plain = import_checkpoint(save(tmp_path, L1, checkpoint(adaptive=False)), tmp_path / "l1")
    assert not (plain / "adaptive_state.safetensors").exists()


@pytest.mark.parametrize("for_training", [False, True])
def test_imported_files_may_be_read_as_the_umask_says(tmp_path: Path, for_training: bool) -> None:
    before = os.umask(0o022)
    try:
        folder = import_checkpoint(
            save(tmp_path, AEN, checkpoint()), tmp_path / "out", for_training=for_training
        )
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o644"}


def test_import_for_training_can_be_trained_on(tmp_path: Path) -> None:
    content = checkpoint(dtype=torch.float32)
    folder = import_checkpoint(save(tmp_path, AEN, content), tmp_path / "out", for_training=True)
    sae = TrainingSAE.load_from_disk(folder)
    ema = content["model_state_dict"]["ema_abs_activations"]
    assert_close(sae.feature_acts_ema, ema)
    assert sae.cfg.l1_coefficient == pytest.approx(0.002 * D_IN)
    assert sae.cfg.gamma == 0.5
    assert int(sae.n_observed_steps) == 100_000
    assert float(sae.ramp) == 1.0
    reference = ema.clamp_min(1e-5).max()  # 5 % of 10 features: the strongest one
    assert_close(sae.l1_weights, (reference / ema.clamp_min(1e-5)).pow(0.5).clamp(0.01, 10.0))
    with pytest.raises(ValueError, match="TopK model is no AEN-SAE"):
        import_checkpoint(save(tmp_path, TOPK, checkpoint(adaptive=False)), tmp_path / "t", for_training=True)


def test_saelens_converter_reads_the_file_itself(tmp_path: Path) -> None:
    content = checkpoint(adaptive=False)
    path = save(tmp_path, "checkpoints/llama8b/topk/seed0/unnamed.pt", content)
    loader = partial(authors_checkpoint_disk_loader, k=2)
    sae = SAE.load_from_disk(path, converter=loader, dtype="float64")
    h, x_hat = published_forward(content, X, 2)
    assert_close(sae.encode(X), h)
    assert_close(sae(X), x_hat)
    before = path.read_bytes()
    with torch.no_grad():
        sae.W_enc.add_(1.0)
        sae.b_dec.add_(1.0)
    assert path.read_bytes() == before


def test_synthetic_models_get_no_scaling_and_need_no_hook(tmp_path: Path) -> None:
    path = save(tmp_path, "checkpoints/spiked/seed0/l1/lambda1_0p01.pt", checkpoint(adaptive=False))
    cfg = json.loads((import_checkpoint(path, tmp_path / "out") / "cfg.json").read_text())
    assert cfg["normalize_activations"] == "none"
    with pytest.raises(ValueError, match="--model_name, --hook_name"):
        import_checkpoint(save(tmp_path, "a.pt", checkpoint()), tmp_path / "b")
    folder = import_checkpoint(
        tmp_path / "a.pt", tmp_path / "b", model_name="me/lm", hook_name="blocks.1.hook_resid_post"
    )
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["model_name"] == "me/lm"


class _Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare", "bare protocol 4"])
def test_a_checkpoint_with_code_is_refused_and_nothing_runs(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "it-ran"
    content = checkpoint(trainer_config=_Runs(marker))
    path = tmp_path / AEN
    path.parent.mkdir(parents=True)
    if kind.startswith("bare"):
        path.write_bytes(pickle.dumps(content["trainer_config"], protocol=4 if "4" in kind else 2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    # torch stops at protocol 4 before it knows what is wanted
    message = "holds more than tensors" if "4" in kind else r"would run code \(it wants .*system"
    with pytest.raises(ValueError, match=message):
        import_checkpoint(path, tmp_path / "out")
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    torch.load(path, weights_only=False) if not kind.startswith("bare") else pickle.loads(path.read_bytes())
    assert marker.exists()  # the very file does harm where it is trusted


def test_harmless_settings_are_let_through(tmp_path: Path) -> None:
    path = save(
        tmp_path, AEN,
        checkpoint(
            trainer_config=argparse.Namespace(lambda1=0.002, out=Path("runs")),
            run_metadata={"array": np.arange(3), "dtype": torch.bfloat16, "device": torch.device("cpu")},
        ),
    )  # fmt: skip
    assert read_checkpoint(path).settings["lambda_1"] == 0.002


def without(name: str) -> dict[str, Any]:
    content = checkpoint()
    del content["model_state_dict"][name]
    return content


def with_tensor(name: str, tensor: Any) -> dict[str, Any]:
    content = checkpoint()
    content["model_state_dict"][name] = tensor
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({"weights": 1}, "no 'model_state_dict'; its keys are weights"),
        (without("b_dec"), "misses b_dec"),
        (without("decoder.weight"), "misses decoder.weight"),
        (with_tensor("threshold", torch.zeros(D_SAE)), "tensors of another model: threshold"),
        (with_tensor("encoder.bias", 3.0), "encoder.bias is a float"),
        (with_tensor("decoder.weight", torch.zeros(D_SAE, D_IN)), r"decoder.weight has shape \(10, 6\)"),
        (with_tensor("ema_abs_activations", torch.zeros(3)), r"ema_abs_activations has shape \(3,\)"),
        (with_tensor("b_dec", torch.zeros(D_IN)), "not one floating-point type"),
        (with_tensor("b_dec", torch.full((D_IN,), float("nan"), dtype=torch.bfloat16)), "b_dec holds numbers that are not finite"),
        (checkpoint(trainer_config={"lambda_1": 0.001}), "disagrees with itself on lambda_1: 0.002 by the file's name, 0.001"),
        (checkpoint(run_metadata={"d_sae": 99}), "disagrees with itself on d_sae: 10 by the weights, 99"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_right_is_refused_with_a_reason(
    tmp_path: Path, content: Any, message: str
) -> None:
    path = save(tmp_path, AEN, content)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out" / "cfg.json").exists()


def test_k_comes_from_name_or_flag_and_must_agree(tmp_path: Path) -> None:
    content = checkpoint(adaptive=False)
    named = save(tmp_path, TOPK, content)
    unnamed = save(tmp_path, "checkpoints/llama8b/topk/seed0/run.pt", content)
    assert read_checkpoint(named).settings["k"] == 3
    assert read_checkpoint(unnamed, k=4).settings["k"] == 4
    with pytest.raises(ValueError, match=r"neither its name nor its content says k"):
        read_checkpoint(unnamed)
    with pytest.raises(ValueError, match="k=4 was given, but the checkpoint says k=3"):
        read_checkpoint(named, k=4)
    with pytest.raises(ValueError, match="from 1 to d_sae = 10, got 11"):
        read_checkpoint(unnamed, k=11)
    with pytest.raises(ValueError, match="no TopK model but l1"):
        read_checkpoint(save(tmp_path, L1, content), k=4)
    with pytest.raises(ValueError, match="holds the adaptive state"):
        read_checkpoint(save(tmp_path, TOPK, checkpoint()))


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, AEN, checkpoint())
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "text": b"hello, this is text", "empty": b""}[damage])
    with pytest.raises(ValueError, match="is refused"):
        read_checkpoint(path)


def test_command_and_its_refusal_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path, AEN, checkpoint())
    assert import_command([str(path), str(tmp_path / "out")]) == 0
    assert "SAE.load_from_disk" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="holds a dictionary already"):
        import_command([str(path), str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError, match="no file"):
        import_command([str(tmp_path / "nothing.pt"), str(tmp_path / "o")])
    with pytest.raises(ValueError, match="expected hf://"):
        import_command(["hf://nonsense", str(tmp_path / "o")])
