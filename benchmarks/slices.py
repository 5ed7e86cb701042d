"""Comparing processes on a machine that drifts.

They run in turns of a fraction of a second, one at a time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple


class Seconds(NamedTuple):
    """What a contender's measured work took."""

    wall: float  # of the slices it was given
    cpu: float  # over all its threads
    result: dict[str, float]


class Spans:
    """Wall and CPU seconds of the parts of a worker's work that count.

    ``with spans:`` marks one, and they may be several.
    """

    def __init__(self) -> None:
        self.wall: list[tuple[float, float]] = []
        self.cpu = 0.0

    def __enter__(self) -> Spans:
        self._start = time.monotonic(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall.append((self._start[0], time.monotonic()))
        self.cpu += time.process_time() - self._start[1]


def ready() -> None:
    """In a worker: warmed up; stop here until the first slice."""
    os.kill(os.getpid(), signal.SIGSTOP)


def report(spans: Spans, **result: float) -> None:
    """In a worker: the last line of output, read by ``run_in_slices``."""
    print(json.dumps({"wall": spans.wall, "cpu": spans.cpu, "result": result}), flush=True)


def run_in_slices(commands: Mapping[str, Sequence[str]], slice_s: float = 0.4) -> dict[str, Seconds]:
    """Run workers in turns until each has ended.

    Whatever slows the machine down then slows them all down. Each is brought to ``ready()`` alone and before
    any is measured.

    Args:
        commands: By contender.
        slice_s: Length of a turn; long enough that what it costs to be stopped does not count.

    Raises:
        RuntimeError: If a worker fails; its error is on stderr.
    """
    with ExitStack() as stack:
        # a stopped worker would outlive a benchmark that is cut short, with all its memory
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)))
        workers = {}
        for name, command in commands.items():
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.callback(process.kill)
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                raise RuntimeError(f"the worker {name!r} ended before it was ready")
            workers[name] = process
        slices = _take_turns(workers, slice_s)
    out = {}
    for name, process in workers.items():
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        if process.returncode != 0 or not lines:
            raise RuntimeError(f"the worker {name!r} failed with exit code {process.returncode}")
        said = json.loads(lines[-1])
        wall = sum(max(0.0, min(b, d) - max(a, c)) for a, b in said["wall"] for c, d in slices[name])
        out[name] = Seconds(wall, said["cpu"], said["result"])
    return out


def _take_turns(
    workers: Mapping[str, subprocess.Popen[str]], slice_s: float
) -> dict[str, list[tuple[float, float]]]:
    """From when to when each ran, until all have ended."""
    slices: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    running = list(workers)
    while running:
        for name in list(running):
            start = time.monotonic()
            workers[name].send_signal(signal.SIGCONT)
            try:
                workers[name].wait(slice_s)
                running.remove(name)
            except subprocess.TimeoutExpired:
                workers[name].send_signal(signal.SIGSTOP)
            slices[name].append((start, time.monotonic()))
    return slices


def python(file: str, **options: object) -> list[str]:
    """The command of a worker in a Python file."""
    return [sys.executable, file, *(f"--{k}={v}" for k, v in options.items())]
