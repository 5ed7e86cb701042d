"""What all figures share: their frame, axes, and lines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from aen_lightning.report.trained import TrainedSAE

MAX_POINTS = 1000
"""Most points of a curve; a longer one is thinned evenly, its last point kept."""
_GRID = "#e4e7eb"


@dataclass
class Figure:
    """A plotly figure and what surrounds it.

    Args:
        id: For links and file names.
        section: Heading it stands under.
        title: What it shows.
        caption: How to read it: what a good curve looks like, and what a bad one means.
        figure: Traces of one dictionary have its label as ``legendgroup``; the page has one legend for all
            figures.
        own_legend: Whether the figure has a legend of its own instead.
    """

    id: str
    section: str
    title: str
    caption: str
    figure: go.Figure
    own_legend: bool = False


def floats(values: Iterable[Any]) -> list[float | None]:
    """For traces: plain numbers, None where there is none."""
    # lists, not arrays: plotly would write those as base64, which nobody can read or search
    return [float(v) if np.isfinite(v) else None for v in values]


def plain(text: str) -> str:
    """``text`` for a trace, shown as it is: plotly reads names and texts as a kind of HTML, with links."""
    return escape(text, quote=False)


def thin(series: pd.Series[Any]) -> pd.Series[Any]:
    """At most ``MAX_POINTS`` points of a curve, evenly spaced, with the first and the last."""
    if len(series) <= MAX_POINTS:
        return series
    return series.iloc[np.linspace(0, len(series) - 1, MAX_POINTS).round().astype(int)]


def finish(figure: go.Figure, height: int) -> go.Figure:
    """Give a figure the looks and the height (pixels) of this report; axes keep what else was set."""
    figure.update_layout(
        template="plotly_white", height=height, margin={"l": 60, "r": 20, "t": 50, "b": 50}, showlegend=False,
        font={"family": "system-ui, sans-serif", "size": 13}, hovermode="closest",
        hoverlabel={"namelength": -1},
    )  # fmt: skip
    axis = {
        "showline": True,
        "linecolor": "#9aa5b1",
        "gridcolor": _GRID,
        "zeroline": False,
        "ticks": "outside",
    }
    return figure.update_xaxes(**axis).update_yaxes(**axis)


def log_axis(values: Iterable[float | None]) -> dict[str, Any]:
    """A logarithmic axis with plain numbers; plotly writes bare digits (2, 5) between the powers of ten."""
    positive = [v for v in values if v is not None and v > 0] or [1.0]
    low, high = np.log10(min(positive)), np.log10(max(positive))
    powers = range(int(np.floor(low)) - 1, int(np.ceil(high)) + 1)
    steps = (1, 1.5, 2, 3, 5, 7) if high - low < 0.9 else (1, 2, 5) if high - low < 2.5 else (1,)
    ticks = [s * 10.0**p for p in powers for s in steps]
    pad = 0.06 * max(high - low, 0.3)
    return {
        "type": "log", "range": [low - pad, high + pad], "tickvals": ticks,
        "ticktext": [f"{t:,.0f}" if t >= 1 else f"{t:g}" for t in ticks],
    }  # fmt: skip


def add_histogram(
    figure: go.Figure,
    d: TrainedSAE,
    colour: str,
    values: NDArray[Any],
    edges: NDArray[Any],
    note: str,
    **at: int,
) -> None:
    """Percent of all values in each bin, as a line through the middles of the bins: many SAEs fit in one."""
    share = 100 * np.histogram(values, edges)[0] / max(1, len(values))
    figure.add_trace(
        go.Scatter(
            x=floats((edges[1:] + edges[:-1]) / 2), y=floats(share), mode="lines",
            line={"color": colour, "width": 1.8},
            name=plain(d.label), legendgroup=d.label,
            hovertemplate=f"%{{fullData.name}}{note}<br>%{{y:.2f}} % of features here<extra></extra>",
        ),
        **at,
    )  # fmt: skip
