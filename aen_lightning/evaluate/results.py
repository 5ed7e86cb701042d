"""Results of commands: the head of every JSON, writing it, and tables for the screen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aen_lightning.files import write_json
from aen_lightning.files.redaction import without_secrets

SCHEMA = 1
_PACKAGES = ("aen-lightning", "sae-lens", "torch", "transformers")


def head(command: str) -> dict[str, Any]:
    """``command``, ``schema`` (of the layout), ``created`` (UTC) and ``versions``.

    The first keys of every result.
    """
    return {
        "command": command,
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_result(result: dict[str, Any], path: str | Path) -> Path:
    """Write a result as JSON, whole or not at all, without secrets (the address of a dataset may hold one).

    Raises:
        ValueError: If it holds a nan or an infinity, which JSON has not.
    """
    return write_json(path, without_secrets(result))


def result_path(reference: str | Path, given: str | None, file_name: str) -> Path | None:
    """Where a result goes.

    Where asked, else into the dictionary's own folder; None for a dictionary that is no local folder.
    """
    if given is not None:
        return Path(given)
    return Path(reference) / file_name if Path(reference).is_dir() else None


def number(value: float | None, se: float | None = None) -> str:
    """A number for people, with its standard error, if any, to one digit more than it deserves."""
    if value is None:
        return "-"
    text = f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return text if se is None else f"{text} ± {se:.2g}"


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] = ()) -> str:
    """Aligned columns, the first to the left; a row of one cell is a heading."""
    full = [row for row in (header, *rows) if len(row) > 1]
    widths = [max(len(row[i]) for row in full) for i in range(len(full[0]))]
    lines = []
    for row in (header, *rows) if header else rows:
        if len(row) == 1:
            lines.append(f"\n{row[0]}")
            continue
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines).strip("\n")


def short_names(references: Sequence[str]) -> list[str]:
    """Names for columns: the shortest endings of the paths that tell them apart."""
    parts = [Path(r).parts for r in references]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i + 1}: {r}" for i, r in enumerate(references)]
