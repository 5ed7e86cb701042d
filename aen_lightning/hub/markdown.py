"""Pieces of Markdown for the model card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table without the columns in which no row has anything."""
    keep = [i for i in range(len(head)) if any(row[i] not in (None, "") for row in rows)]
    lines = [[head[i] for i in keep], ["---"] * len(keep), *([_cell(row[i]) for i in keep] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def number(value: Any) -> str | None:
    """A number for people; None for what is none."""
    if value is None or isinstance(value, bool):
        return None
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def code(value: Any) -> str | None:
    """``value`` in the type of code; None for None."""
    return None if value is None else f"`{value}`"
