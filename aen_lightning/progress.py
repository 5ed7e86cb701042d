"""How far long work is. Libraries count here and print nothing; ``aen`` shows it (:func:`shown`).

Counting is an addition, and nothing happens to the count unless somebody shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Task:
    """Work of which so many units are done.

    Args:
        what: As ``filling the buffer``.
        total: Units in all; None: nobody knows.
        unit: What is counted, in the plural; empty: nothing is, and only the time is shown.
        done: Units done so far.
        start: Units that were done before.
        note: What else to say now, as ``loss 0.31``.
    """

    what: str
    total: int | None = None
    unit: str = ""
    done: int = 0
    start: int = field(default=0, kw_only=True)
    note: str = field(default="", kw_only=True)


Show = Callable[[Task], AbstractContextManager[object]]
_show: Show = nullcontext


@contextmanager
def working(what: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
    """Say that work is going on; add to ``done`` of what it gives. The arguments are those of ``Task``."""
    task = Task(what, total, unit)
    with _show(task):
        yield task


def counted(items: Iterable[T], what: str, total: int | None = None, unit: str = "batches") -> Iterator[T]:
    """The items, each counted when the next one is asked for."""
    with working(what, total, unit) as task:
        for item in items:
            yield item
            task.done += 1


@contextmanager
def shown(show: Show) -> Iterator[None]:
    """While open, every task is shown by ``show``: a context manager that is open as long as the task."""
    global _show  # one process has one screen
    before, _show = _show, show
    try:
        yield
    finally:
        _show = before
