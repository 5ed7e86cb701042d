"""The tables of the report: what stands in their cells, as text; the page's templates lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aen_lightning.evaluate.results import number
from aen_lightning.report.collect import Report
from aen_lightning.report.trained import TrainedSAE
from aen_lightning.runs.curves import METRICS


@dataclass(frozen=True)
class Cell:
    """A cell or a heading. All of it is plain text.

    Args:
        text: What it says.
        sort_by: What its column is sorted by.
        hint: Explanation, in small letters beneath.
        tooltip: Shown when the mouse rests on it.
        label: Of the SAE whose colour stands before the text.
        emphasis: Text after it, in italics.
    """

    text: str
    sort_by: str = ""
    hint: str = ""
    tooltip: str = ""
    label: str | None = None
    emphasis: str = ""


@dataclass(frozen=True)
class Table:
    """Headings, and rows as long.

    Args:
        head: The headings.
        rows: The cells.
        sortable: Whether a click on a heading sorts.
    """

    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    sortable: bool = True


@dataclass(frozen=True)
class TableCard:
    """A table and what surrounds it.

    Args:
        id: For links and file names.
        title: What it shows.
        table: The table.
        caption: How to read it.
        note: Where its numbers are from.
    """

    id: str
    title: str
    table: Table
    caption: str = ""
    note: str = ""


_ALWAYS = ("lambda_1", "lambda_2", "gamma", "k")
_SUMMARY = {
    "l0": ("L0", "active features per token"),
    "explained_variance": ("explained variance", "1 is perfect"),
    "mse": ("MSE", "mean over d_in"),
    "shrinkage_ratio": ("shrinkage", "1 is none"),
    "dead_features_pct": ("dead, %", "never fired"),
}
_DEAD = "dead_features_pct"


def summary_table(report: Report) -> TableCard:
    """A row per SAE: what it is, the settings that differ, and the metrics at the end."""
    saes = report.dictionaries
    keys = list(dict.fromkeys(key for d in saes for key in d.settings))
    shown = [key for key in keys if key != "d_sae" and (key in _ALWAYS or _varies(key, saes))]
    metrics = [m for m in METRICS if m != _DEAD and any(m in d.metrics for d in saes)]
    head = [Cell("dictionary"), Cell("kind"), Cell("d_sae", hint="features")]
    head += [Cell(key, hint="setting") for key in shown]
    head += [Cell(title, hint=hint) for title, hint in (_SUMMARY[m] for m in (*metrics, _DEAD))]
    rows, sources, dead_sources = [], set(), set()
    for d in saes:
        row = [
            Cell(
                d.label, d.label, tooltip=d.name or (_short(d.folder) if d.folder else d.run), label=d.label
            ),
            Cell(d.family, d.family),
            Cell(f"{d.d_sae:,}" if d.d_sae else "-", str(d.d_sae or "")),
        ]
        row += [_setting(d.settings.get(key)) for key in shown]
        row += [value_cell(d.metrics.get(metric)) for metric in metrics]
        dead, source = d.dead_pct() or (None, "")
        row.append(value_cell(dead, tooltip=source))
        rows.append(row)
        if d.metrics:
            sources.add(d.metrics_source)
        if source and source != d.metrics_source:
            dead_sources.add(source)
    note = f"Metrics are from: {'; '.join(sorted(sources))}. " if sources else ""
    if dead_sources:
        note += f"Where these say nothing of dead features, that is from: {'; '.join(sorted(dead_sources))}. "
    return TableCard("summary", "All dictionaries", Table(head, rows), note=f"{note}Click a heading to sort.")


def _varies(key: str, saes: Sequence[TrainedSAE]) -> bool:
    """Whether a setting differs inside a family.

    Between families most settings differ because one has them and the other has not.
    """
    families = {d.family for d in saes}
    values = [{repr(d.settings.get(key)) for d in saes if d.family == family} for family in families]
    return any(len(v) > 1 for v in values)


def _setting(value: Any) -> Cell:
    if value is None:
        return Cell("-")
    return Cell(f"{value:g}" if isinstance(value, float) else str(value), str(value))


def _short(path: Path) -> str:
    """The path as seen from here: a report is passed on, and whose computer it was made on is nobody's business."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def value_cell(value: float | None, tooltip: str = "") -> Cell:
    """A number for people, sorted as it is."""
    return Cell(number(value), "" if value is None else repr(value), tooltip=tooltip)
