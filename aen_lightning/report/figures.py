"""The figures of the report, each with a caption that says what a good one looks like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from aen_lightning.diagnostics import coherence
from aen_lightning.report.collect import Report
from aen_lightning.report.drawing import Figure, add_histogram, finish, floats, log_axis, plain
from aen_lightning.report.naming import colours, family_styles, has_own_weights
from aen_lightning.report.trained import NEVER_FIRED, TrainedSAE
from aen_lightning.report.training_curves import curve_figures
from aen_lightning.saes.aen import ARCHITECTURE
from aen_lightning.saes.export import ADAPTIVE_STATE_FILENAME
from aen_lightning.training.pareto import pareto_fronts


def make_figures(report: Report, *, max_geometry_features: int = 32768) -> list[Figure]:
    """All figures there are data for, in the order of the page.

    Args:
        report: From ``collect``; notes are added to it for what is left out.
        max_geometry_features: Dictionaries with more features get no histogram of cosines, which takes
            ``d_sae**2 * d_in`` multiplications.
    """
    dictionaries = report.dictionaries
    figures = [_pareto(dictionaries, metric) for metric in ("explained_variance", "dead_features_pct")]
    figures += curve_figures(dictionaries)
    figures += [_density(dictionaries), _weights(report), _geometry(report, max_geometry_features)]
    figures += [_composition(dictionaries)]
    order = ("Trade-offs", "Training", "Dead features", "Adaptive weights", "Geometry")
    return sorted((f for f in figures if f is not None), key=lambda f: order.index(f.section))


_PARETO = {
    "explained_variance": (
        "Explained variance against sparsity", "explained variance (1 = perfect)", True,
        "Each point is a dictionary at the end of training; lines join those that no other of their family "
        "beats. Up and to the left is better: more of the activation explained with fewer active features. "
        "Compare families at equal L0 only. This is figure 2 of the paper for these runs.",
    ),
    "dead_features_pct": (
        "Dead features against sparsity", "dead features (% of d_sae)", False,
        "Share of features that never fired on the validation data. Down and to the left is better. Every "
        "feature in this share is capacity paid for and not used. On few validation tokens rare features "
        "look dead, so compare only runs that saw as many. This is figure 3 of the paper for these runs.",
    ),
}  # fmt: skip


def _pareto(dictionaries: Sequence[TrainedSAE], metric: str) -> Figure | None:
    title, y_title, higher, caption = _PARETO[metric]
    known = [d for d in dictionaries if metric in d.metrics and "l0" in d.metrics]
    if len(known) < 2:
        return None
    table = pd.DataFrame(
        {"name": d.label, "architecture": d.family, "l0": d.metrics["l0"], metric: d.metrics[metric]}
        for d in known
    )
    fronts, figure = pareto_fronts(table, metric, higher_is_better=higher), go.Figure()
    for family, (colour, symbol) in family_styles(dictionaries).items():
        mine = [d for d in known if d.family == family]
        if not mine:
            continue
        front = fronts[family]
        if len(front) > 1:
            figure.add_scatter(
                x=floats(p["l0"] for p in front), y=floats(p[metric] for p in front), mode="lines",
                legendgroup=family, line={"color": colour, "width": 1.5, "dash": "dot"}, showlegend=False,
                hoverinfo="skip",
            )  # fmt: skip
        figure.add_scatter(
            x=floats(d.metrics["l0"] for d in mine), y=floats(d.metrics[metric] for d in mine),
            mode="markers", name=plain(family), legendgroup=family, text=[plain(d.label) for d in mine],
            marker={"color": colour, "symbol": symbol, "size": 11, "line": {"width": 1, "color": "white"}},
            hovertemplate="%{text}<br>L0 %{x:.4g}, " + metric.replace("_", " ") + " %{y:.4g}<extra></extra>",
        )  # fmt: skip
    finish(figure, 420)
    figure.update_xaxes(
        **log_axis(d.metrics["l0"] for d in known), title_text="L0 (active features per token, logarithmic)"
    )
    figure.update_yaxes(title_text=y_title, rangemode="normal" if higher else "tozero")
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    id = "pareto-" + metric.replace("_", "-")
    return Figure(id, "Trade-offs", title, caption, figure, own_legend=True)


def _density(dictionaries: Sequence[TrainedSAE]) -> Figure | None:
    mine = [(d, density) for d in dictionaries if (density := d.log_density()) is not None]
    if not mine:
        return None
    colour = colours(dictionaries)
    live = np.concatenate([v[v > NEVER_FIRED] for _, v in mine])
    lowest = np.floor(live.min()) if len(live) else -6.0
    edges = np.arange(min(lowest, -3.0), 0.001, 0.2)
    edges = np.append(edges, 0.0) if edges[-1] < -1e-6 else edges
    figure = make_subplots(
        1, 2, column_widths=[0.7, 0.3], subplot_titles=["Features that fired", "Never fired"]
    )
    for d, values in mine:
        silent = values <= NEVER_FIRED
        add_histogram(
            figure, d, colour[d.label], values, edges, f" ({silent.mean():.1%} never fired)", row=1, col=1
        )
        bar = go.Bar(
            x=[100 * float(silent.mean())], y=[plain(d.label)], orientation="h",
            marker={"color": colour[d.label]}, name=plain(d.label), legendgroup=d.label,
            hovertemplate="%{fullData.name}: %{x:.2f} % never fired<extra></extra>",
            text=[f"{silent.mean():.1%}"], textposition="outside", cliponaxis=False,
            width=min(0.8, 0.2 * len(mine)),
        )  # fmt: skip
        figure.add_trace(bar, row=1, col=2)
    powers = list(range(int(edges[0]), 1))
    labels = [f"1 in {10**-p:,}" if -p < 6 else f"1 in 10{_superscript(-p)}" for p in powers]
    labels[-1] = "always"
    figure.update_xaxes(
        tickvals=powers,
        ticktext=labels,
        title_text="firing rate: tokens on which the feature is active",
        row=1,
        col=1,
    )
    figure.update_yaxes(title_text="% of features, per bin", rangemode="tozero", row=1, col=1)
    most = max(100 * float((v <= NEVER_FIRED).mean()) for _, v in mine)
    figure.update_xaxes(title_text="% of features", range=[0, max(1.3 * most, 1.0)], row=1, col=2)
    figure.update_yaxes(showticklabels=False, range=[len(mine) - 0.4, -0.6], row=1, col=2)
    finish(figure, 380).update_yaxes(ticks="", row=1, col=2)
    caption = (
        "How often features fire, over the last window of training steps before the end. Good: one broad "
        "hump, and few that never fired. A second hump at the far left is features about to die; features "
        "right of 1 in 10 fire on so much that they seldom mean one thing. The window can be short: "
        "features that never fired in it are not all dead for good."
    )
    return Figure("density", "Dead features", "How often features fire", caption, figure)


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _weights(report: Report) -> Figure | None:
    dictionaries, mine = report.dictionaries, []
    for d in dictionaries:
        if (weights := d.l1_weights()) is not None:
            mine.append((d, weights))
        elif d.training_architecture == ARCHITECTURE and has_own_weights(d.settings):
            report.notes.append(
                f"{d.label} has no {ADAPTIVE_STATE_FILENAME} with L1 weights beside it: they are not shown."
            )
    if not mine:
        return None
    colour, figure = colours(dictionaries), make_subplots(1, 1)
    lowest = min(float(w.min()) for _, w in mine)
    highest = max(float(w.max()) for _, w in mine)
    edges = np.linspace(np.log10(max(min(lowest, 0.5), 1e-3)) - 0.06, np.log10(max(highest, 2.0)) + 0.06, 60)
    for d, weights in mine:
        low, high = d.settings.get("weight_min"), d.settings.get("weight_max")
        pinned = (
            [f"{np.mean(weights >= high):.1%} at the maximum {high:g}"]
            if isinstance(high, int | float)
            else []
        )
        pinned += (
            [f"{np.mean(weights <= low):.1%} at the minimum {low:g}"] if isinstance(low, int | float) else []
        )
        add_histogram(
            figure,
            d,
            colour[d.label],
            np.log10(weights.clip(1e-3)),
            edges,
            f" ({', '.join(pinned)})",
            row=1,
            col=1,
        )
    ticks = [
        t
        for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
        if edges[0] <= np.log10(t) <= edges[-1]
    ]
    figure.update_xaxes(
        tickvals=floats(np.log10(ticks)),
        ticktext=[f"{t:g}" for t in ticks],
        title_text="adaptive weight (multiple of the L1 coefficient)",
    )
    figure.update_yaxes(title_text="% of features, per bin", rangemode="tozero")
    caption = (
        "What each feature pays at the end, ramp included: below 1 it is spared, above 1 it is pressed. "
        "Good: a spread, with the used features low and spurious ones high. A single spike at the maximum "
        "means that all features pay the same, so nothing is adaptive any more; a spike at 1 means that the "
        "ramp has not begun, or, with a starvation guard alone, that few features need it. Hover for the "
        "shares pinned at the bounds."
    )
    return Figure(
        "weights", "Adaptive weights", "Distribution of the adaptive weights", caption, finish(figure, 360)
    )


def _geometry(report: Report, max_features: int) -> Figure | None:
    figure, colour, edges = make_subplots(1, 1), colours(report.dictionaries), np.linspace(0, 1, 51)
    for d in report.dictionaries:
        if d.dictionary is None or d.d_sae is None:
            continue
        if d.d_sae > max_features:
            report.notes.append(
                f"{d.label} has {d.d_sae:,} features: its histogram of cosines was left out (raise "
                f"--max_geometry_features)."
            )
            continue
        found = coherence(d.dictionary.W_dec()).max_abs_cosine.cpu().numpy()
        note = f" (mean {found.mean():.3f}, {np.mean(found > 0.9):.1%} above 0.9)"
        add_histogram(figure, d, colour[d.label], found, edges, note, row=1, col=1)
    if not figure.data:
        return None
    figure.update_xaxes(title_text="largest |cosine| with another feature's decoder direction", range=[0, 1])
    figure.update_yaxes(title_text="% of features, per bin", rangemode="tozero")
    caption = (
        "For every feature, how close its nearest neighbour lies. Good: a hump well below 1 (it moves right "
        "as the dictionary grows, since directions get crowded). Mass near 1 is twins: features that say "
        "the same thing and split it between them. Dead features keep their random directions from the "
        "start of training, and make a hump of their own on the left."
    )
    return Figure(
        "geometry", "Geometry", "How close features lie to each other", caption, finish(figure, 360)
    )


def _composition(dictionaries: Sequence[TrainedSAE]) -> Figure | None:
    mine = [
        (d, d.diagnosis["composition"])
        for d in dictionaries
        if d.diagnosis and d.diagnosis.get("composition")
    ]
    if not mine:
        return None
    panels = (
        ("lost_share", "Lost", "% of the features set"),
        ("spurious", "Spurious", "features that should not be there"),
    )
    figure, colour = (
        make_subplots(1, 2, subplot_titles=[title for _, title, _ in panels]),
        colours(dictionaries),
    )
    for i, (key, _, y_title) in enumerate(panels, start=1):
        for d, section in mine:
            factor = 100.0 if key == "lost_share" else 1.0
            y = [None if v is None else factor * v for v in section[key]]
            line = {"color": colour[d.label], "width": 1.8}
            hover = "%{fullData.name}<br>%{x} together: %{y:.4g}<extra></extra>"
            trace = go.Scatter(
                x=section["sizes"],
                y=y,
                mode="lines+markers",
                line=line,
                name=plain(d.label),
                legendgroup=d.label,
                hovertemplate=hover,
            )
            figure.add_trace(trace, row=1, col=i)
        figure.update_yaxes(title_text=y_title, rangemode="tozero", row=1, col=i)
        sizes = [k for _, section in mine for k in section["sizes"]]
        figure.update_xaxes(title_text="features set active together", **log_axis(sizes), row=1, col=i)
    caption = (
        "Features are switched on together, decoded, and encoded again (aen diagnose). Good: both stay near "
        "zero up to the L0 of the dictionary and beyond. Rising early: features interfere, and codes of "
        "several features cannot be trusted when one edits them."
    )
    return Figure(
        "composition",
        "Geometry",
        "What becomes of features that are active together",
        caption,
        finish(figure, 340),
    )
