"""The convexity of coding with a concave penalty, by hand and against second derivatives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

from aen_lightning import AENTrainingSAE, AENTrainingSAEConfig
from aen_lightning.cli.main import main
from aen_lightning.diagnostics.convexity import coding_convexity
from aen_lightning.saes.export import export_sae
from aen_lightning.saes.penalty import penalty_slopes


def exported(path: Path, l2: float, penalty: str = "mcp", reached: float | None = None) -> SAE:
    cfg = AENTrainingSAEConfig(
        d_in=4, d_sae=8, l1_coefficient=0.6, l2_coefficient=l2, penalty=penalty, penalty_shape=2.5
    )
    sae = AENTrainingSAE(cfg)
    if sae.activation_scale is not None:
        sae.activation_scale.fill_(0.8)
    if reached is not None:
        sae.cfg.metadata["reached_l1_coefficient"] = reached
    return SAE.load_from_disk(export_sae(sae, path))


@pytest.mark.parametrize("penalty", ["mcp", "scad", "log"])
def test_what_is_needed_is_the_steepest_fall_of_the_slopes(tmp_path: Path, penalty: str):
    weights = torch.tensor([1.0] * 7 + [2.0])
    scale = torch.tensor(0.8)
    found = coding_convexity(
        exported(tmp_path, l2=0.25, penalty=penalty), activation_scale=scale, l1_weights=weights
    )
    h = torch.linspace(0, 5, 200_001, dtype=torch.float64)
    slopes = penalty_slopes(h, penalty=penalty, scale=scale.double(), shape=2.5)  # type: ignore[arg-type]
    steepest = float(-(slopes.diff() / h.diff()).min())
    assert found["l2_needed"] == pytest.approx(0.6 * 2 * steepest / 2, rel=1e-3)
    assert found["ratio"] == pytest.approx(0.25 / found["l2_needed"])
    assert found["is_convex"] == (found["l2_needed"] <= 0.25)


def test_the_reached_coefficient_counts_and_an_l1_penalty_says_nothing(tmp_path: Path):
    scale = torch.tensor(0.8)
    sae = exported(tmp_path / "a", l2=0.25, reached=1.2)
    # 1.2 / (2.5 * 0.8) / 2
    assert coding_convexity(sae, activation_scale=scale)["l2_needed"] == pytest.approx(0.3)
    assert coding_convexity(sae, activation_scale=None)["is_convex"] is None
    assert coding_convexity(exported(tmp_path / "b", l2=0.25, penalty="l1"), activation_scale=scale) is None


@pytest.mark.parametrize(("l2", "said"), [(0.25, "is convex for every"), (0.1, "need not be convex")])
def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], l2: float, said: str):
    exported(tmp_path, l2=l2)
    assert main(["diagnose", str(tmp_path), "--no_inputs"]) == 0
    assert said in capsys.readouterr().out
    found = json.loads((tmp_path / "diagnosis.json").read_text())["convexity"]
    assert found["l2_needed"] == pytest.approx(0.15)  # 0.6 / (2.5 * 0.8) / 2
