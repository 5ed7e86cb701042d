"""A few odd inputs of every kind; ``benchmarks/fuzz.py`` takes thousands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.fuzzing import KINDS, RunsCode, fuzz


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_odd_files_are_taken_for_what_they_are_or_refused_in_one_line(kind: str, tmp_path: Path):
    tally = fuzz(kind, 15, tmp_path / "root", at=7)
    assert tally.tried == 15
    assert tally.accepted + tally.refused == 15
    assert not tally.faults


def test_the_sentinel_would_tell_if_code_ran(tmp_path: Path):
    torch.save({"state_dict": RunsCode(str(tmp_path / "code ran"))}, tmp_path / "x.ckpt")
    torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert (tmp_path / "code ran").exists()
