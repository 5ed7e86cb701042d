"""What a command says: its answer on the standard output, remarks beside it, progress on the standard error.

With ``--json`` the answer is one JSON object and remarks go to the standard error; with ``--quiet`` there are
neither remarks nor progress.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from aen_lightning.progress import shown

OPTIONS = ("--quiet", "--json")
_given: frozenset[str] = frozenset()


@contextmanager
def spoken(options: frozenset[str]) -> Iterator[None]:
    """While open, commands speak as the options (of ``OPTIONS``) ask."""
    global _given  # one process has one screen
    before, _given = _given, options
    try:
        if "--quiet" in options:
            yield
            return
        from aen_lightning.cli.progress import show

        with shown(show):
            yield
    finally:
        _given = before


def wants_json() -> bool:
    """Whether the answer is asked for as JSON."""
    return "--json" in _given


def is_quiet() -> bool:
    """Whether remarks are unwanted."""
    return "--quiet" in _given


def remark(text: str) -> None:
    """Say something beside the answer: where a file went, what was left out, what to do next."""
    if not is_quiet():
        print(text, file=sys.stderr if wants_json() else sys.stdout, flush=True)


def answer(result: Mapping[str, Any] | Sequence[Any], text: Callable[[], str]) -> None:
    """Print what was asked for: as JSON, or as text for people.

    Args:
        result: Of what JSON can hold; a nan or an infinity becomes null, which JSON has.
        text: Makes the text.
    """
    print(json.dumps(_finite(result), allow_nan=False) if wants_json() else text(), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
