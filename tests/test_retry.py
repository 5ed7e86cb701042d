"""What is called again, how long is waited, and when it is given up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from aen_lightning.retry import retry


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    noted: list[float] = []
    monkeypatch.setattr(time, "sleep", noted.append)
    return noted


def failing(n: int, error: Exception) -> Callable[[], str]:
    """Fails ``n`` times, then answers."""
    left = [error] * n

    def call() -> str:
        if left:
            raise left.pop()
        return "answer"

    return call


def patiently(call: Callable[[], Any], **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "attempts": 6, "worth_it": lambda error: True, "announce": lambda *_: None, "wait_seconds": 1.0,
    }  # fmt: skip
    return retry(call, **{**defaults, **options})


def test_waits_double_up_to_the_longest(waits: list[float]):
    assert patiently(failing(5, OSError()), longest_wait_seconds=6.0) == "answer"
    assert waits == [1.0, 2.0, 4.0, 6.0, 6.0]


def test_a_longer_wait_that_the_error_asks_for_counts_but_not_beyond_the_longest(waits: list[float]):
    for asked in (3.0, 100.0):
        patiently(
            failing(3, OSError()), longest_wait_seconds=50.0, asked_wait=lambda error, asked=asked: asked
        )
    assert waits == [3.0, 3.0, 4.0, 50.0, 50.0, 50.0]


def test_each_wait_is_announced(waits: list[float]):
    said: list[Any] = []
    error = OSError("busy")
    patiently(failing(2, error), announce=lambda *what: said.append(what))
    assert said == [(error, 1.0, 1), (error, 2.0, 2)]


def test_the_last_error_is_raised_as_it_is(waits: list[float]):
    error = OSError("busy")
    with pytest.raises(OSError, match="busy") as raised:
        patiently(failing(6, error))
    assert raised.value is error
    assert len(waits) == 5


def test_an_error_not_worth_it_is_raised_at_once(waits: list[float]):
    with pytest.raises(KeyError):
        patiently(failing(1, KeyError()), worth_it=lambda error: isinstance(error, OSError))
    assert waits == []


def test_no_attempt_is_refused():
    with pytest.raises(ValueError, match="attempts must be at least 1, got 0"):
        patiently(failing(0, OSError()), attempts=0)
