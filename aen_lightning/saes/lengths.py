"""Lengths of time: a number of steps, or a share of the run.

An integer counts steps; a float strictly between 0 and 1 is a share of ``max_steps``, so that a run can be made
longer by one number. Anything else (``1.0``, ``0.0``, ``200.0``) could be meant either way and is refused.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

Length: TypeAlias = int | float


def is_share(value: Any) -> bool:
    """Whether a length is a share of the run."""
    return isinstance(value, float) and 0 < value < 1


def is_length(value: Any, *, at_least: int | None = 0) -> bool:
    """Whether ``value`` is a share, or an integer that is not below ``at_least``."""
    if is_share(value):
        return True
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and (at_least is None or value >= at_least)


def check_length(value: Any, name: str, *, at_least: int | None = 0) -> None:
    """Refuse what is no length.

    Raises:
        ValueError: With ``name``, the value and what was expected.
    """
    if not is_length(value, at_least=at_least):
        raise ValueError(f"{name} must be {length_expected(at_least)}, got {value!r}")


def length_expected(at_least: int | None = 0) -> str:
    """What an error says that a length must be."""
    bound = "" if at_least is None else f" >= {at_least}"
    return f"an integer number of steps{bound}, or a share of the run, a float in (0, 1)"


def in_steps(value: Length, run_steps: float | None, name: str) -> int:
    """A length in steps; a share is rounded, to one step at the least.

    Args:
        value: The length.
        run_steps: Length of the run; infinite, negative or None: not known.
        name: Of the setting, for the error.

    Raises:
        ValueError: For a share of a run whose length is not known.
    """
    if isinstance(value, int):
        return value
    if run_steps is None or math.isinf(run_steps) or run_steps < 1:  # Lightning says -1 as well
        raise ValueError(
            f"{name}={value} is a share of the run, whose length is not known: set trainer.max_steps, or "
            "give a number of steps"
        )
    return max(1, round(value * run_steps))
