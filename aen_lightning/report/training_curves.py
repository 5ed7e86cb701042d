"""Curves over training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from aen_lightning.report.drawing import Figure, finish, floats, log_axis, plain, thin
from aen_lightning.report.naming import colours, has_own_weights
from aen_lightning.report.trained import TrainedSAE

_PANEL_PX = 300


@dataclass(frozen=True)
class _Panel:
    title: str
    y_title: str
    keys: tuple[str, ...]  # the first that a dictionary has is a line; one with val/ is drawn as points
    log: bool = False
    factor: float = 1.0
    per_feature: bool = False  # a count, shown as percent of d_sae
    from_zero: bool = False
    stairs: bool = False  # one value a window, logged again and again until the next


_TRAINING = (
    _Panel(
        "Explained variance",
        "share, 1 = perfect",
        ("metrics/explained_variance", "val/metrics/explained_variance"),
    ),
    _Panel("L0", "active features per token", ("metrics/l0", "val/metrics/l0"), log=True),
    _Panel("Squared error", "summed over d_in, per token", ("losses/mse_loss",), log=True),
    _Panel("Total loss", "error + penalties", ("losses/overall_loss",), log=True),
    _Panel(
        "Shrinkage ratio", "‖x̂‖₁ / ‖x‖₁, 1 = none", ("metrics/shrinkage_ratio", "val/metrics/shrinkage_ratio")
    ),
    _Panel("Learning rate", "", ("details/current_learning_rate",), from_zero=True),
)
_DEAD = (
    _Panel("Silent now", "% of features", ("sparsity/dead_features",), per_feature=True, from_zero=True),
    _Panel(
        "Dead in a window",
        "% of features",
        ("sparsity/dead_features_window_pct",),
        from_zero=True,
        stairs=True,
    ),
    _Panel(
        "Recovered",
        "% of those dead before",
        ("sparsity/recovery_rate",),
        factor=100.0,
        from_zero=True,
        stairs=True,
    ),
)
_ADAPTIVE = (
    _Panel("Ramp", "0 = plain L1, 1 = adaptive", ("metrics/adaptive_ramp",), from_zero=True),
    _Panel("Mean weight", "multiple of the L1 coefficient", ("metrics/l1_weight_mean",), from_zero=True),
    _Panel(
        "Pinned at the maximum",
        "% of features",
        ("metrics/l1_weight_pinned_max",),
        factor=100.0,
        from_zero=True,
    ),
    _Panel(
        "Pinned at the minimum",
        "% of features",
        ("metrics/l1_weight_pinned_min",),
        factor=100.0,
        from_zero=True,
    ),
)
_ADAPTIVE_KEYS = {key for panel in _ADAPTIVE for key in panel.keys}  # constant without adaptive weights
_CURVES = (
    (
        "training", "Training", "Training curves", _TRAINING,
        "Lines are single training batches, so they are noisy; dots are the whole validation split. Good: "
        "L0 settles where you want it, and explained variance then rises and flattens (before, while an L1 "
        "penalty warms up, both fall together). Still rising at the end: train longer. Validation clearly "
        "below training: overfitting. A shrinkage ratio well below 1 means the L1 penalty makes "
        "reconstructions too small. Errors are in the space the dictionary trains in, after any input "
        "scaling.",
    ),
    (
        "dead", "Dead features", "Dead features and their recovery", _DEAD,
        "Silent now: features that have not fired for the run's dead_feature_window (steps). Dead in a "
        "window: features that never fired in the last full window of steps (a stair each). Recovered: of "
        "those dead in the window before, how many fired again (with hardly any dead, it jumps between 0 "
        "and 100). Good: the first two low and falling. High and flat with no recovery means features are "
        "lost for good: lower the L1 coefficient or warm it up more slowly. Early on everything counts as "
        "alive, because no window is full yet.",
    ),
    (
        "adaptive", "Adaptive weights", "How the adaptive weights came in", _ADAPTIVE,
        "Every feature has its own multiple of the L1 coefficient, which the ramp lets in after a delay. "
        "Good: the mean settles and few weights are pinned. Nearly all pinned at the maximum means that the "
        "penalty is a uniform, larger one, and adapts no more.",
    ),
)  # fmt: skip


def curve_figures(dictionaries: Sequence[TrainedSAE]) -> list[Figure]:
    """Training, dead features and adaptive weights over the steps; panels nobody logged are left out."""
    figures = [_curves(dictionaries, *spec) for spec in _CURVES]
    return [f for f in figures if f is not None]


def _curves(
    dictionaries: Sequence[TrainedSAE],
    id: str,
    section: str,
    title: str,
    panels: Sequence[_Panel],
    caption: str,
) -> Figure | None:
    panels = [
        p for p in panels if any(_series(d, key, p) is not None for d in dictionaries for key in p.keys)
    ]
    if not panels:
        return None
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[p.title for p in panels],
        horizontal_spacing=0.22 / columns,
        vertical_spacing=0.22 / rows,
    )
    colour = colours(dictionaries)
    for i, panel in enumerate(panels):
        at, n_traces = {"row": i // columns + 1, "col": i % columns + 1}, len(figure.data)
        for d in dictionaries:
            for key in panel.keys:
                series = _series(d, key, panel)
                if series is None:
                    continue
                held_out = key.startswith("val/")
                sparse = held_out or len(series) == 1
                style = (
                    {
                        "mode": "markers",
                        "marker": {
                            "color": colour[d.label],
                            "size": 7,
                            "line": {"width": 1, "color": "white"},
                        },
                    }
                    if sparse
                    else {
                        "mode": "lines",
                        "line": {
                            "color": colour[d.label],
                            "width": 1.8,
                            "shape": "hv" if panel.stairs else "linear",
                        },
                    }
                )
                name = plain(f"{d.label} (validation)" if held_out else d.label)
                hover = "%{fullData.name}<br>step %{x:,}: %{y:.4g}<extra></extra>"
                trace = go.Scatter(
                    x=[int(s) for s in series.index],
                    y=floats(series),
                    name=name,
                    legendgroup=d.label,
                    hovertemplate=hover,
                    **style,
                )
                figure.add_trace(trace, **at)
        figure.update_yaxes(title_text=panel.y_title, title_standoff=6, **at)
        drawn = [v for t in figure.data[n_traces:] for v in t.y if v is not None]
        if panel.log:
            figure.update_yaxes(**log_axis(drawn), **at)
        elif panel.from_zero:
            # a constant would stand in the middle of an axis from -1 to 1
            figure.update_yaxes(range=[0, 1.08 * (max(drawn) or 1.0)], **at)
        if i + columns >= len(panels):
            figure.update_xaxes(title_text="training step", title_standoff=4, **at)
    return Figure(id, section, title, caption, finish(figure, _PANEL_PX * rows + 40))


def _series(d: TrainedSAE, key: str, panel: _Panel) -> pd.Series[Any] | None:
    if key not in d.curves or (key in _ADAPTIVE_KEYS and not has_own_weights(d.settings)):
        return None
    series = d.curves[key]
    if panel.per_feature:
        if d.d_sae is None:
            return None
        series = 100 * series / d.d_sae
    return thin(series * panel.factor) if len(series) else None
