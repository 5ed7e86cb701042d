"""Puts the report together as one HTML file that needs nothing else: no network, no other file.

Nothing that comes from a run, a dictionary or a corpus can become markup: Jinja2 escapes it, or it travels as
JSON and is written by the page's script as text. And should something slip through, the page's
Content-Security-Policy lets the browser run the two scripts and apply the one style sheet whose hashes it
names, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from aen_lightning.report.collect import Report
from aen_lightning.report.drawing import Figure
from aen_lightning.report.naming import colours
from aen_lightning.report.result_tables import comparison_tables, result_tables
from aen_lightning.report.tables import TableCard, summary_table


def render_report(
    report: Report,
    figures: Sequence[Figure],
    features: Sequence[dict[str, Any]] = (),
    *,
    title: str | None = None,
) -> str:
    """The page.

    Args:
        report: From ``collect``.
        figures: From ``make_figures``.
        features: From ``feature_pages``, each with ``label`` (of the dictionary) and ``note`` (what the texts
            are) added.
        title: Heading; None names the runs.
    """
    environment = _environment()
    colour_of = colours(report.dictionaries)
    css = environment.get_template("page.css").render(colours=list(colour_of.values()), figures=figures)
    page_js = files("aen_lightning.report").joinpath("templates", "page.js").read_text(encoding="utf-8")
    plotly_js = get_plotlyjs()
    return environment.get_template("page.html").render(
        title=title or "Report: " + ", ".join(dict.fromkeys(d.run for d in report.dictionaries)),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        versions={name: version(name) for name in ("aen-lightning", "sae-lens")},
        policy=content_security_policy(scripts=(plotly_js, page_js), styles=(css,)),
        css=css,
        plotly_js=plotly_js,
        page_js=page_js,
        number_of_label={label: i for i, label in enumerate(colour_of)},
        sections=_sections(report, figures),
        features=features,
        configs=report.configs,
        notes=report.notes,
        figure_data=[
            {"id": f.id, "own_legend": f.own_legend, "figure": json.loads(f.figure.to_json())}
            for f in figures
        ],
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("aen_lightning.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # `tojson` also escapes what could end the script element that it stands in
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "allow_nan": False,
        "separators": (",", ":"),
    }
    return environment


def content_security_policy(*, scripts: Iterable[str], styles: Iterable[str]) -> str:
    """A policy under which a page runs these inline scripts, applies these inline styles, and loads nothing.

    Args:
        scripts: Content of each ``<script>``, to the letter.
        styles: Content of each ``<style>``. The empty one is allowed as well: plotly adds it and fills it
            rule by rule, which needs no permission. Style attributes are forbidden, and so are the styles of
            plotly's maps, which no figure here needs.
    """
    directives = {
        "default-src": "'none'",
        "script-src": " ".join(map(_source, scripts)),
        "style-src": " ".join(map(_source, (*styles, ""))),
        "img-src": "data: blob:",  # plotly's button that saves a picture
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in directives.items())


def _source(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _sections(report: Report, figures: Sequence[Figure]) -> dict[str, list[Figure | TableCard]]:
    """Figures and tables under their headings, in the order of the page."""
    sections: dict[str, list[Figure | TableCard]] = {"Dictionaries": [summary_table(report)]}
    for figure in figures:
        sections.setdefault(figure.section, []).append(figure)
    if results := result_tables(report) + comparison_tables(report):
        sections["Evaluation"] = [*results]
    return sections
