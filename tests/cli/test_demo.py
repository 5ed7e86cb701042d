from __future__ import annotations

import re
import subprocess
import sys
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
        if re.match(r"(AEN\S*|L1|TopK) .*\d$", line) and ": " not in line
    }
    assert set(rows) == {"AEN", "AEN-paper", "AEN-guard", "L1", "TopK"}
    assert out.index("AEN ") < out.index("AEN-paper")  # the winner first
    assert float(rows["AEN"][0]) == pytest.approx(8, rel=0.15)
    assert float(rows["TopK"][0]) == 8.0
    assert "JumpReLUSAE" in out
    assert SAE.load_from_disk(tmp_path / "aen" / "sae" / "final").cfg.d_sae == 256


@pytest.mark.slow
def test_demo_in_a_process_of_its_own_says_no_more_than_its_table(tmp_path: Path) -> None:
    """What Lightning says of hardware and products stays off a newcomer's first screen."""
    command = [sys.executable, "-m", "aen_lightning", "demo", "--steps", "100", "--preset", "paper"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=True)
    assert "\nAEN " not in done.stdout
    assert "\nAEN-paper " in done.stdout
    said = [line for line in done.stderr.splitlines() if not line.startswith(("loading ", "training "))]
    assert said == []
