"""Starts ranks as forks of a process that has imported everything: a fresh one takes seven seconds of a core to do so.

What a launcher does beside that (torchrun, Lightning's own) is for the tests that start one: tests/sharded/test_text.py,
tests/cli/test_training.py.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["aen_lightning.training.module", "aen_lightning.harvest", "tests.support.training"]
)


class Forked:
    """The processes of one run, rank by rank, and what they print."""

    def __init__(self, processes: list[ForkServerProcess], printed: Path) -> None:
        self.processes, self._printed = processes, printed

    @property
    def pids(self) -> list[int]:
        """Of each rank."""
        return [process.pid for process in self.processes if process.pid is not None]

    @property
    def output(self) -> str:
        """What all ranks have printed so far, both streams."""
        return self._printed.read_text(encoding="utf-8", errors="replace")

    @property
    def ended(self) -> bool:
        """Whether a rank has."""
        return any(process.exitcode is not None for process in self.processes)

    def codes(self, timeout: float) -> list[int | None]:
        """Exit codes, once all have ended: as of ``subprocess``, None of one that has not after so many seconds."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def finish(self, timeout: float = 240.0) -> str:
        """Wait until all have ended well, and return what they printed."""
        codes = self.codes(timeout)
        if any(codes):
            self.kill()
        assert codes == [0] * len(codes), f"{codes}: {self.output[-4000:]}"
        return self.output

    def kill(self) -> None:
        """End what still runs, stopped or not."""
        for process in self.processes:
            process.kill()
        self.codes(60)


def fork_ranks(script: str | Path, *args: str, n_ranks: int, printed: Path, **env: str) -> Forked:
    """Run a module, or a file, as ``__main__`` on so many processes, in the environment that torchrun gives its own.

    Args:
        script: Name of the module, or the file.
        args: Its arguments.
        n_ranks: Processes.
        printed: File for what they print.
        env: To be added to the environment.
    """
    known = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    common = {k: v for k, v in os.environ.items() if k not in known}
    common |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks),
        "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "forked", "TORCHELASTIC_USE_AGENT_STORE": "False",
    }  # fmt: skip
    printed.write_text("")
    processes = []
    for rank in range(n_ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _context.Process(target=_main, args=(str(script), args, common | own, str(printed)))
        process.start()
        processes.append(process)
    return Forked(processes, printed)


def _main(script: str, args: tuple[str, ...], env: dict[str, str], printed: str) -> None:
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    file = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, encoding="utf-8", closefd=False) for fd in (1, 2))  # noqa: SIM115
    sys.argv = [script, *args]
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
