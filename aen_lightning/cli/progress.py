"""Shows how far work is: a bar on a terminal, else a plain line every ten seconds; short work shows nothing."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from aen_lightning.progress import Task

_FIRST_S = 2.0
_LINE_EVERY_S = 10.0
_BAR_EVERY_S = 0.2


@contextmanager
def show(
    task: Task, *, stream: TextIO | None = None, first_s: float = _FIRST_S, every_s: float | None = None
) -> Iterator[None]:
    """Show a task while this is open, from ``first_s`` seconds on.

    A thread looks at the task now and then, so that also a step that says nothing for minutes is seen to go
    on, and counting costs the work nothing.

    Args:
        task: What is counted.
        stream: Where to; None: the standard error.
        first_s: Seconds until it is first shown.
        every_s: Seconds between two looks. None: 10 for lines, 0.2 for a bar.
    """
    stream = stream or sys.stderr
    ended = threading.Event()
    on_terminal = stream.isatty()
    look = _bar if on_terminal else _lines
    every_s = every_s or (_BAR_EVERY_S if on_terminal else _LINE_EVERY_S)
    thread = threading.Thread(target=look, args=(task, stream, ended, first_s, every_s), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _lines(task: Task, stream: TextIO, ended: threading.Event, first_s: float, every_s: float) -> None:
    began, pause = time.monotonic(), first_s
    while not ended.wait(pause):
        print(line(task, time.monotonic() - began), file=stream, flush=True)
        pause = every_s


def _bar(task: Task, stream: TextIO, ended: threading.Event, first_s: float, every_s: float) -> None:
    began = time.monotonic()
    if ended.wait(first_s):
        return
    bar = tqdm(
        desc=task.what, total=task.total, initial=task.start, unit=f" {task.unit}", file=stream, leave=False,
        dynamic_ncols=True, unit_scale=(task.total or 0) >= 100_000,
        bar_format=None if task.unit else "{desc}: {elapsed}",
    )  # fmt: skip
    bar.start_t -= time.monotonic() - began
    while not ended.wait(every_s):
        bar.n, bar.total = task.done, task.total
        bar.set_postfix_str(task.note, refresh=False)
        bar.refresh()
    bar.close()


def line(task: Task, seconds: float) -> str:
    """``what: 3 of 12 rows (25 %), 9 s, 27 s left; note``."""
    if not task.unit:
        return f"{task.what}: {duration(seconds)}"
    known = task.total is not None and task.total > 0
    text = f"{task.what}: {task.done:,}"
    if known:
        assert task.total is not None
        text += f" of {task.total:,} {task.unit} ({100 * task.done / task.total:.0f} %)"
    else:
        text += f" {task.unit}"
    text += f", {duration(seconds)}"
    if known and task.done > task.start:
        assert task.total is not None
        left = seconds * (task.total - task.done) / (task.done - task.start)
        text += f", {duration(max(0.0, left))} left"
    return f"{text}; {task.note}" if task.note else text


def duration(seconds: float) -> str:
    """``9 s``, ``3 min 05 s``, ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
