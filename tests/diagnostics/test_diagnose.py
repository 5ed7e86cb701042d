"""The commands diagnose and compare, and every architecture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY
from safetensors.torch import save_file
from torch.testing import assert_close

from aen_lightning import AENTrainingSAE, AENTrainingSAEConfig
from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.diagnostics import (
    diagnose_dictionary,
)
from aen_lightning.evaluate import SyntheticInputs, load_dictionary, scaled_space, to_scaled_space
from aen_lightning.evaluate.results import write_result
from tests.support.commands import compare_command, diagnose_command
from tests.support.dictionaries import relu_dictionary


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A dictionary exported from a training SAE on spiked data, after a few steps of its own forward pass."""
    torch.manual_seed(0)
    data = SpikedDataModule(d_in=16, n_features=32, k=3, seed=1)
    cfg = AENTrainingSAEConfig(
        d_in=16, d_sae=48, l1_coefficient=0.3, l2_coefficient=0.05, decoder_init_norm=1.0
    )
    for key, value in data.sae_metadata.items():
        cfg.metadata[key] = value
    sae = AENTrainingSAE(cfg)
    sae.save_inference_model(tmp_path / "a")
    sae.save_model(tmp_path / "training")
    torch.manual_seed(1)
    AENTrainingSAE(cfg).save_inference_model(tmp_path / "b")
    return tmp_path


def test_diagnose_command_writes_all_sections(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        diagnose_command([str(trained / "a"), "--n-tokens", "256", "--n-sample", "16", "--n-lipschitz", "4"])
        == 0
    )
    result = json.loads((trained / "a" / "diagnosis.json").read_text())
    assert result["command"] == "diagnose"
    assert result["skipped"] == {}
    for section in ("coherence", "active_gram", "lipschitz", "coding_gap", "composition"):
        assert result[section], section
    assert result["coding_gap"]["certificate"]["max_relative_gap"] < 1e-9
    assert result["lipschitz"]["coding_map"]["bound"] == pytest.approx(0.5 / math.sqrt(0.05))
    assert (
        result["lipschitz"]["coding_map"]["empirical"]["max"]
        <= result["lipschitz"]["coding_map"]["bound"] + 1e-6
    )
    text = capsys.readouterr().out
    assert "objective above optimum" in text
    assert "features active together" in text


def test_diagnose_command_takes_weights_from_a_training_checkpoint_and_only_what_is_asked(trained: Path):
    weights = str(trained / "training" / "sae_weights.safetensors")
    out = trained / "gap.json"
    args = [
        str(trained / "a"),
        "--only",
        "coding_gap",
        "--n-tokens",
        "64",
        "--n-sample",
        "4",
        "--out",
        str(out),
    ]
    assert diagnose_command([*args, "--l1-weights", weights]) == 0
    result = json.loads(out.read_text())
    assert result["coding_gap"]["source"].endswith("adaptive weights given")
    assert result["coding_gap"]["l1_coefficient_mean"] == pytest.approx(0.3)
    assert result["composition"] is None
    save_file({"x": torch.ones(1)}, trained / "other.safetensors")
    with pytest.raises(ValueError, match="has no tensor l1_weights; it has x"):
        diagnose_command([*args, "--l1-weights", str(trained / "other.safetensors")])


def test_diagnose_without_inputs_gives_the_coherence_only(trained: Path):
    result = diagnose_dictionary(load_dictionary(trained / "a"), None)
    assert result["coherence"]["max"] > 0
    assert set(result["skipped"]) == {"active_gram", "lipschitz", "coding_gap", "composition"}
    with pytest.raises(ValueError, match="no section 'coherenc'"):
        diagnose_dictionary(load_dictionary(trained / "a"), None, sections=["coherenc"])


def test_diagnosis_is_the_same_whether_tokens_come_scaled_or_not():
    """With ``constant_norm_rescale`` everything is measured after the dictionary's own scaling."""
    details = {"l1_coefficient": 0.4, "l2_coefficient": 0.02, "gamma": 0.0}
    data = SpikedDataModule(d_in=8, n_features=20, k=3, seed=1)
    inputs = SyntheticInputs(data, n_samples=128)
    results = []
    for factor in (1.0, 5.0):
        inputs.x *= factor
        sae = relu_dictionary(8, 20, normalize_activations="constant_norm_rescale", **details)
        x = to_scaled_space(sae, inputs.x)
        assert_close(x.norm(dim=-1), torch.full((len(x),), 8**0.5))
        with scaled_space(sae):
            assert_close(sae.encode(x), relu_dictionary(8, 20).encode(x))
        results.append(diagnose_dictionary(sae, inputs, n_sample=16, n_lipschitz=4))
    for section in ("active_gram", "coding_gap", "composition"):
        a, b = (json.loads(json.dumps(r[section]), parse_float=lambda s: round(float(s), 3)) for r in results)
        a.pop("certificate", None), b.pop("certificate", None)
        assert a == b


@pytest.mark.parametrize("architecture", sorted(a for a in SAE_CLASS_REGISTRY if "transcoder" not in a))
def test_every_architecture_of_saelens_is_diagnosed_or_refused_with_a_reason(
    architecture: str, tmp_path: Path
):
    torch.manual_seed(0)
    fields = {"k": 4, "n_heads": 2, "sae_diff_type": "topk", "kval_topk": 4, "bottleneck_factor": 2}
    sae = SAE.from_dict({"architecture": architecture, "d_in": 16, "d_sae": 40, "metadata": {}, **fields})
    for parameter in sae.parameters():
        parameter.data.normal_(0, 0.3)
    sae.save_model(tmp_path)
    inputs = SyntheticInputs(SpikedDataModule(d_in=16, n_features=40, k=3), n_samples=128)
    if architecture == "temporal":
        with pytest.raises(ValueError, match="depend on the tokens before"):
            diagnose_dictionary(load_dictionary(tmp_path), inputs)
        return
    result = diagnose_dictionary(
        load_dictionary(tmp_path), inputs, n_sample=8, n_lipschitz=2, l1_coefficient=0.3
    )
    assert set(result["skipped"]) == ({"coding_gap"} if architecture == "abstopk" else set())
    if architecture != "abstopk":
        assert (
            result["coding_gap"]["objective"]["exact"]
            <= result["coding_gap"]["objective"]["best_on_support"] + 1e-12
        )
        assert (
            result["coding_gap"]["objective"]["best_on_support"]
            <= result["coding_gap"]["objective"]["encoder"] + 1e-12
        )
    write_result(result, tmp_path / "diagnosis.json")  # no nan in it


def test_compare_command(trained: Path, capsys: pytest.CaptureFixture[str]):
    out = trained / "compare.json"
    assert compare_command([str(trained / "a"), str(trained / "b"), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert set(result["dictionaries"]) == {"a", "b"}
    assert result["pairs"][0]["exact"]
    assert "a  ~  b" in capsys.readouterr().out
    with pytest.raises(ValueError, match="at least two dictionaries"):
        compare_command([str(trained / "a")])
