from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aen_lightning.progress import Task, counted, shown, working


def test_a_task_is_shown_while_it_lasts_and_counts_what_is_done_with() -> None:
    seen: list[tuple[str, int | None, int]] = []

    @contextmanager
    def show(task: Task) -> Iterator[None]:
        seen.append((task.what, task.total, task.done))
        yield
        seen.append((task.what, task.total, task.done))

    with shown(show):
        items = counted("abc", "reading", 3)
        assert next(items) == "a"
        assert seen == [("reading", 3, 0)]
        assert list(items) == ["b", "c"]
    assert seen == [("reading", 3, 0), ("reading", 3, 3)]
    with working("reading"):
        pass
    assert len(seen) == 2  # nobody shows it any more


def test_a_loop_that_is_left_early_ends_the_task() -> None:
    ended = []

    @contextmanager
    def show(task: Task) -> Iterator[None]:
        try:
            yield
        finally:
            ended.append(task.done)

    with shown(show):
        for item in counted(range(5), "reading"):
            if item == 2:
                break
    assert ended == [2]
