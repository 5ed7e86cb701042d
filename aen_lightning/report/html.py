"""Puts the report together as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from aen_lightning.report.collect import Report
from aen_lightning.report.drawing import Figure
from aen_lightning.report.naming import colours
from aen_lightning.report.tables import comparison_tables, result_tables, summary_table

# the browser itself refuses whatever a script or a text from the corpus might try to fetch
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def render_report(
    report: Report, figures: Sequence[Figure], features: Sequence[dict[str, Any]] = (), *, title: str | None = None
) -> str:
    """The page.

    Args:
        report: From ``collect``.
        figures: From ``make_figures``.
        features: From ``feature_pages``, each with ``label`` (of the dictionary) and ``note`` (what the texts are) added.
        title: Heading; None names the runs.
    """
    title = title or "Report: " + ", ".join(dict.fromkeys(d.run for d in report.dictionaries))
    sections: dict[str, str] = {
        "Dictionaries": f'<section class="card" id="summary"><h3>All dictionaries</h3>{summary_table(report)}</section>'
    }
    for figure in figures:
        sections[figure.section] = sections.get(figure.section, "") + _card(figure)
    if results := result_tables(report) + comparison_tables(report):
        sections["Evaluation"] = results
    if features:
        sections["Features"] = _FEATURES
    if report.configs:
        sections["Settings"] = "".join(
            f'<section class="card"><details><summary>{escape(run)}: config.yaml</summary><pre>{escape(text)}</pre></details></section>'
            for run, text in report.configs.items()
        )
    anchors = {name: name.lower().replace(" ", "-") + "-section" for name in sections}
    body = "".join(f'<h2 id="{anchors[name]}">{name}</h2>{content}' for name, content in sections.items())
    nav = "".join(f'<a href="#{anchors[name]}">{name}</a>' for name in sections)
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    page = files("aen_lightning.report")
    data = [{"id": f.id, "own_legend": f.own_legend, "figure": json.loads(f.figure.to_json())} for f in figures]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>
<style>{page.joinpath("page.css").read_text(encoding="utf-8")}</style></head><body>
<header><h1>{escape(title)}</h1>
<p class="small">Made {time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())} by aen-lightning {version("aen-lightning")} with sae-lens
{version("sae-lens")}. A dictionary (sparse autoencoder) writes each activation of a model as a sum of few features; this page says how well it
does that (explained variance), with how few (L0), and how many features do nothing (dead).</p>
<nav>{nav}</nav>{f'<ul class="notes">{notes}</ul>' if notes else ""}</header>
{_legend(report)}
<main>{body}</main><footer class="small">All numbers are inside this file; it loads nothing.</footer>
<script>{get_plotlyjs()}</script>
<script type="application/json" id="figure-data">{_embed(data)}</script>
<script type="application/json" id="feature-data">{_embed(list(features))}</script>
<script>{page.joinpath("page.js").read_text(encoding="utf-8")}</script>
</body></html>
"""


def _card(figure: Figure) -> str:
    height = figure.figure.layout.height
    return (
        f'<section class="card" id="{figure.id}"><h3>{escape(figure.title)}</h3><p class="caption">{escape(figure.caption)}</p>'
        f'<div id="plot-{figure.id}" style="height:{height}px"></div></section>'
    )


def _legend(report: Report) -> str:
    buttons = "".join(
        f'<button aria-pressed="true" data-label="{escape(label)}" title="show or hide in all figures">'
        f'<i class="chip" style="background:{colour}"></i>{escape(label)}</button>'
        for label, colour in colours(report.dictionaries).items()
    )
    return f'<div id="legend">{buttons}</div>'


def _embed(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


_FEATURES = """<section class="card" id="features"><h3>What features respond to</h3>
<p class="caption">Each row is a feature of the dictionary; click it for the texts on which it fires, the features nearest to it, and the output
tokens it pushes up and down. Good: its texts have one thing in common that a sentence can say. Look at the ordinary texts, too: the
strongest alone flatter a feature. <span class="scale"></span> from not active to the feature's maximum; grey italics were left out of
training. Promoted and suppressed tokens are the decoder direction times the LM head, without the final norm: the direct effect alone,
which says more about late layers than about early ones.</p>
<p class="caption" id="feature-note"></p>
<p><select id="which" aria-label="dictionary"></select>
<input type="search" id="query" placeholder="number, or a text in its contexts and tokens" aria-label="search features">
<span id="found" class="small"></span></p>
<table id="feature-table"><colgroup><col style="width:70px"><col style="width:85px"><col style="width:75px"><col style="width:75px"><col>
<col style="width:26%"></colgroup><thead><tr><th data-key="id">feature</th>
<th data-key="density" data-dir="▼" title="share of tokens on which it is active">density</th>
<th data-key="mean" title="mean activation on the tokens where it is active">mean</th><th data-key="max" title="largest activation seen">max</th>
<th>strongest text</th><th>promotes</th></tr></thead><tbody></tbody></table></section>"""
