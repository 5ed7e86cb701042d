"""Trying again what may succeed the next time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def retry(
    call: Callable[[], T],
    *,
    attempts: int,
    worth_it: Callable[[Exception], bool],
    announce: Callable[[Exception, float, int], None],
    wait_seconds: float,
    longest_wait_seconds: float = math.inf,
    asked_wait: Callable[[Exception], float] = lambda error: 0.0,
) -> T:
    """Call until it succeeds, and wait longer after each failure.

    Args:
        call: Must be safe to repeat.
        attempts: Calls in all.
        worth_it: Whether another call may mend this error.
        announce: Told of the error, the wait that follows in seconds, and the number of the call that failed,
            from 1.
        wait_seconds: The first wait; each further one is twice as long.
        longest_wait_seconds: No wait is longer.
        asked_wait: The wait that an error asks for, in seconds; it counts if it is the longer one.

    Returns:
        What ``call`` returned.

    Raises:
        Exception: The error of the last call, or the first that is not ``worth_it``, as it is.
        ValueError: If ``attempts`` is below 1.
    """
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, got {attempts}")
    attempt = 0
    while True:
        attempt += 1
        try:
            return call()
        except Exception as error:
            if attempt == attempts or not worth_it(error):
                raise
            wait = min(max(wait_seconds * 2 ** (attempt - 1), asked_wait(error)), longest_wait_seconds)
            announce(error, wait, attempt)
            time.sleep(wait)
