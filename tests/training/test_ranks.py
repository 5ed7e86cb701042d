"""Two ranks of which one gets a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def start(folder: Path, steps: int, *, pause: float = 0.0, checkpoint: str = "") -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    unset = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in unset} | {"PYTHONPATH": str(ROOT)}
    words = [str(folder), str(steps), str(pause), *([checkpoint] if checkpoint else [])]
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
