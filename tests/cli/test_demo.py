from __future__ import annotations

from pathlib import Path

import pytest
from sae_lens import SAE

from aen_lightning.cli.main import main


def test_demo_prints_the_comparison_and_loads_the_dictionary_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--steps", "120", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split()[1:]
        for line in out.splitlines()
        if line.startswith(("AEN", "L1 ", "TopK "))
    }
    assert set(rows) == {"AEN", "AEN-paper", "AEN-guard", "L1", "TopK"}
    assert out.index("AEN ") < out.index("AEN-paper")  # the winner first
    assert float(rows["AEN"][0]) == pytest.approx(8, rel=0.15)
    assert float(rows["TopK"][0]) == 8.0
    assert "JumpReLUSAE" in out
    assert SAE.load_from_disk(tmp_path / "aen" / "sae" / "final").cfg.d_sae == 256


def test_demo_without_the_recommended_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--steps", "100", "--out", str(tmp_path), "--preset", "paper"]) == 0
    out = capsys.readouterr().out
    assert "\nAEN " not in out
    assert "\nAEN-paper " in out
