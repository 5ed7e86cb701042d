"""Two ranks of which one gets a signal, or stops."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from aen_lightning.callbacks import RankWatch
from tests.support.forked import Forked, fork_ranks

pytestmark = pytest.mark.slow


def start(
    folder: Path, steps: int, *, pause: float = 0.0, timeout: float = 60.0, checkpoint: str = ""
) -> Forked:
    folder.mkdir(exist_ok=True)
    words = [str(folder), str(steps), str(pause), str(timeout), *([checkpoint] if checkpoint else [])]
    return fork_ranks("tests.support.ddp_signals", *words, n_ranks=2, printed=folder / "printed")


def pids(run: Forked, folder: Path) -> list[int]:
    """Of both ranks, once they train."""
    deadline = time.monotonic() + 150
    while not all((folder / f"pid{rank}").exists() for rank in (0, 1)):
        assert not run.ended, run.output[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return run.pids


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """How a run ends that nothing cuts short."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    start(folder, 60).finish()
    return torch.load(folder / "end.pt", weights_only=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_saves_all_at_the_same_step(
    tmp_path: Path, whole: dict[str, torch.Tensor], rank: int
):
    folder = tmp_path / "cut"
    cut = start(folder, 60, pause=0.05)
    os.kill(pids(cut, folder)[rank], signal.SIGTERM)
    assert cut.codes(100) == [75, 0], cut.output  # rank 0 speaks for all
    assert "interrupted by SIGTERM after step" in cut.output
    assert not (folder / "end.pt").exists()
    start(folder, 60, checkpoint=str(folder / "checkpoints" / "interrupted.ckpt")).finish()
    other = torch.load(folder / "end.pt", weights_only=True)
    for name, value in whole.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_ends_the_other_by_its_name(tmp_path: Path, rank: int):
    run = start(tmp_path, 100_000, pause=0.05, timeout=5.0)
    try:
        os.kill(pids(run, tmp_path)[rank], signal.SIGSTOP)
        began = time.monotonic()
        other = run.processes[1 - rank]
        other.join(60)
        assert other.exitcode == 1, run.output
        assert time.monotonic() - began > 4
    finally:
        run.kill()
    assert f"rank {rank} has shown no sign of life for 5 s" in run.output


def test_a_rank_that_computes_for_long_is_not_taken_for_a_stopped_one(tmp_path: Path):
    start(tmp_path, 4, pause=2.5, timeout=2.0).finish()
    assert not list(tmp_path.rglob(".alive-*"))


def test_negative_time_is_refused():
    with pytest.raises(ValueError, match=r"timeout_s must be >= 0 seconds \(0: never\), got -1"):
        RankWatch(-1)
