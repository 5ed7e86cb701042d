from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from aen_lightning.report import collect, make_figures, render_report
from aen_lightning.training.module import SweepModule
from tests.support.report_pages import Page, written


def test_the_page_fetches_nothing_and_nothing_breaks_out_of_it(sweep: tuple[Path, SweepModule]):
    report = collect([sweep[0]])
    nasty = "</script><img src=http://example.invalid/x><!--<script>"
    report.dictionaries[0].label = report.configs["sweep & <b>"] = nasty
    features = [{"label": nasty, "note": nasty, "features": []}]
    page = Page(render_report(report, make_figures(report), features, title=nasty))
    assert all(a.startswith("#") for a in page.fetched)
    assert json.loads(page.data["feature-data"]) == features
    assert nasty in page.text


def test_the_policy_names_the_scripts_and_the_style_of_the_page_and_nothing_else(dictionary: Path):
    page = written([dictionary])
    directives = dict(part.split(" ", 1) for part in page.policy.split("; "))
    assert directives["default-src"] == directives["base-uri"] == directives["form-action"] == "'none'"
    assert len(page.scripts) == 2
    assert directives["script-src"] == " ".join(map(sha256, page.scripts))
    # plotly adds empty styles, and rules to them
    assert directives["style-src"] == " ".join(map(sha256, [*page.styles, ""]))
    assert "unsafe" not in page.policy
    assert not [tag for tag, attributes in page.elements if "style" in attributes or "onclick" in attributes]


def sha256(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
