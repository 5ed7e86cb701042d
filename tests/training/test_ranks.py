"""Two ranks of which one gets a signal, or stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from aen_lightning.callbacks import RankWatch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def start(
    folder: Path, steps: int, *, pause: float = 0.0, timeout: float = 60.0, checkpoint: str = ""
) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    unset = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in unset} | {"PYTHONPATH": str(ROOT)}
    words = [str(folder), str(steps), str(pause), str(timeout), *([checkpoint] if checkpoint else [])]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.ddp_signals", *words], cwd=ROOT, env=env, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def pids(process: subprocess.Popen[str], folder: Path) -> list[int]:
    """Of both ranks, once they train."""
    deadline = time.monotonic() + 150
    while not all((folder / f"pid{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int((folder / f"pid{rank}").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """How a run ends that nothing cuts short."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run = start(folder, 60)
    assert run.wait(200) == 0, run.communicate()[1][-2000:]
    return torch.load(folder / "end.pt", weights_only=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_saves_all_at_the_same_step(
    tmp_path: Path, whole: dict[str, torch.Tensor], rank: int
):
    folder = tmp_path / "cut"
    cut = start(folder, 60, pause=0.05)
    os.kill(pids(cut, folder)[rank], signal.SIGTERM)
    error = cut.communicate(timeout=100)[1]
    assert cut.returncode == 75, error
    assert "interrupted by SIGTERM after step" in error
    assert not (folder / "end.pt").exists()
    resumed = start(folder, 60, checkpoint=str(folder / "checkpoints" / "interrupted.ckpt"))
    assert resumed.wait(200) == 0, resumed.communicate()[1][-2000:]
    other = torch.load(folder / "end.pt", weights_only=True)
    for name, value in whole.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_ends_the_other_by_its_name(tmp_path: Path, rank: int):
    process = start(tmp_path, 100_000, pause=0.05, timeout=5.0)
    ranks = pids(process, tmp_path)
    try:
        os.kill(ranks[rank], signal.SIGSTOP)
        began = time.monotonic()
        while is_running(ranks[1 - rank]):
            assert time.monotonic() - began < 60
            time.sleep(0.1)
        assert time.monotonic() - began > 4
    finally:
        for pid in filter(is_running, ranks):
            os.kill(pid, signal.SIGKILL)
    assert f"rank {rank} has shown no sign of life for 5 s" in process.communicate(timeout=30)[1]
    if rank == 1:  # rank 0 is the process that was started
        assert process.returncode == 1


def is_running(pid: int) -> bool:
    """Whether it is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_rank_that_computes_for_long_is_not_taken_for_a_stopped_one(tmp_path: Path):
    process = start(tmp_path, 4, pause=2.5, timeout=2.0)
    assert process.wait(200) == 0, process.communicate()[1][-2000:]
    assert not list(tmp_path.rglob(".alive-*"))


def test_negative_time_is_refused():
    with pytest.raises(ValueError, match=r"timeout_s must be >= 0 seconds \(0: never\), got -1"):
        RankWatch(-1)
