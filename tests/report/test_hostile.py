"""A stranger's dictionaries, runs and results in the report.

Whatever they hold is text, and nothing of it runs.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from aen_lightning.report import collect, make_figures, render_report
from aen_lightning.report.browser import dump_dom, find_browser
from tests.support.report_pages import Page

BROWSER = find_browser()
RUN = "document.documentElement.dataset.pwned=1"
IN_A_NAME = f'"><img src=x onerror="{RUN}"><b>'  # can be a folder: no slash in it
ANYWHERE = f"{IN_A_NAME}</script><script>{RUN}</script><!--<a href='https://example.invalid/'>%{{x}}</a>{{{{ 7 * 7 }}}}"
HOVER_EVERYTHING = """<script>
for (const div of document.querySelectorAll(".js-plotly-plot")) {
  const points = div.data.map((trace, i) => ({ curveNumber: i, pointNumber: 0 }));
  for (const point of points) Plotly.Fx.hover(div, [point]);
}
</script>"""


def report_about(folder: Path, name: str, text: str) -> str:
    """The page about a run with two dictionaries that says ``name`` and ``text`` wherever it can."""
    run = folder / f"run {name}"
    members = [f"{name}{i}" for i in "ab"]
    for i, member in enumerate(members):
        write_dictionary(run / "sae" / "final" / member, text, i)
    with (run / "sweep.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            ["name", "architecture", "l0", "explained_variance", "dead_features_pct", f"column {text}"]
        )
        table.writerows([member, text, 3 + i, 0.5, 10, f"{text}{i}"] for i, member in enumerate(members))
    keys = ("metrics/l0", "val/metrics/l0", "losses/mse_loss", "sparsity/dead_features", f"metrics/{text}")
    with (run / "metrics.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", text, *(f"{member}/{key}" for member in members for key in keys)])
        table.writerows([step, text, *[1.5] * (2 * len(keys))] for step in (0, 10))
    (run / "config.yaml").write_text(f"model: {text}\n")
    (folder / "comparison.json").write_text(json.dumps(comparison(members, text)))
    report = collect([run], [folder / "comparison.json"])
    report.notes.append(text)
    return render_report(report, make_figures(report), [feature_set(text)], title=text)


def write_dictionary(folder: Path, text: str, number: int) -> None:
    folder.mkdir(parents=True)
    cfg = {
        "architecture": text, "d_in": 4, "d_sae": 6, f"key {text}": text,
        "metadata": {
            "training_architecture": text, text: text, "model_name": text, "hook_name": text,
            "training_architecture_details": {f"setting {text}": f"{text}{number}", "gamma": f"{text}{number}"},
        },
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file({"W_dec": torch.eye(6, 4)}, folder / "sae_weights.safetensors")
    save_file(
        {"sparsity": torch.tensor([-1.0, -2.0, -2.5, -3.0, -10.0, -1.5])}, folder / "sparsity.safetensors"
    )
    save_file({"l1_weights": torch.linspace(0.5, 5, 6)}, folder / "adaptive_state.safetensors")
    evaluation = {
        "command": "evaluate",
        text: text,
        "features": {"n_tokens": 10, "dead_pct": 5.0, text: text},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    composition = {"sizes": [1, 2], "lost_share": [0, 0.5], "spurious": [0, 1], text: text}
    (folder / "diagnosis.json").write_text(json.dumps({"command": "diagnose", "composition": composition}))


def comparison(names: list[str], text: str) -> dict[str, Any]:
    a, b = names
    again = {f"0.7{text}": {"of_a": 0.5, "of_b": 0.25}}
    return {
        "command": "compare", "n_features": dict.fromkeys(names, 6), "n_compared": dict.fromkeys(names, 3),
        "dead_features_left_out": True, "pairs": [{"a": a, "b": b, "cosine": {"mean": 0.9}, "found_again": again}],
        "random_baseline": {name: {"cosine": {"mean": 0.1}, "found_again": {f"0.7{text}": 0.0}} for name in names},
    }  # fmt: skip


def feature_set(text: str) -> dict[str, Any]:
    context = {"quantile": None, "peak": 1, "tokens": [text, text], "acts": [None, 1.0]}
    feature = {
        "id": 3, "density": 0.5, "mean": 0.5, "max": 1.0, "neighbours": [[4, 0.5]], "promoted": [[text, 1.0]],
        "suppressed": [[text, -1.0]], "contexts": [context], "together": [[4, 0.5]], "logits": None,
        "acts": {"from": 0, "to": 1.0, "counts": [1, 0, 2]},
    }  # fmt: skip
    return {"label": text, "note": text, "features": [feature]}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report_about(tmp_path_factory.mktemp("hostile"), IN_A_NAME, ANYWHERE)


def test_no_element_and_no_attribute_comes_from_data(hostile: str, tmp_path: Path):
    harmless = Page(report_about(tmp_path, "member ", "some text"))
    page = Page(hostile)
    assert page.elements == harmless.elements
    assert harmless.text.count("some text") == page.text.count(ANYWHERE) >= 20, (
        "the data are on the page, as text"
    )
    assert "49" not in page.text.replace(ANYWHERE, ""), "and no template"
    for place in ("column", "setting", "found at 0.7"):
        assert f"{place} {ANYWHERE}".replace("0.7 ", "0.7") in page.text


def test_a_label_in_a_figure_is_no_markup_to_plotly(hostile: str):
    texts = []
    for figure in json.loads(Page(hostile).data["figure-data"]):
        for trace in figure["figure"]["data"]:
            texts += (
                [trace.get("name", ""), trace["hovertemplate"], *trace.get("text", [])]
                if "name" in trace
                else []
            )
    assert any("&lt;img" in text for text in texts)
    allowed = re.compile(r"<br>|<extra></extra>")
    assert not [text for text in texts if "<" in allowed.sub("", text)]


def dom_of(html: str, folder: Path) -> str:
    assert BROWSER is not None
    (folder / "page.html").write_text(html, encoding="utf-8")
    return dump_dom(BROWSER, folder / "page.html", "open=1")


def pwned(dom: str) -> bool:
    (root,) = re.findall(r"<html[^>]*>", dom)
    return "data-pwned" in root


def without_policy(html: str) -> str:
    return re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)


@pytest.mark.slow
@pytest.mark.skipif(
    BROWSER is None, reason="no Chromium or Chrome here: the page is not looked at in a browser"
)
def test_in_a_browser_nothing_of_it_runs_even_without_the_policy(hostile: str, tmp_path: Path):
    dom = dom_of(without_policy(hostile).replace("</body>", f"{HOVER_EVERYTHING}</body>"), tmp_path)
    assert "data-heights" in dom, "the page's own scripts have finished"
    assert "hovertext" in dom, "and the figures' texts were shown"
    assert not pwned(dom)
    shown = re.sub(r"<script\b.*?</script>", "", dom, flags=re.DOTALL)
    assert not re.search(r"<(img|b|iframe|object)\b", shown)
    assert '="https://example.invalid' not in shown, "plotly makes links of what looks like one"


@pytest.mark.slow
@pytest.mark.skipif(
    BROWSER is None, reason="no Chromium or Chrome here: the page is not looked at in a browser"
)
def test_in_a_browser_a_page_with_one_feature_opens_at_its_top(hostile: str, tmp_path: Path):
    note = "setTimeout(() => document.documentElement.dataset.at = `${scrollY} ${location.hash}`, 3000)"
    page = tmp_path / "page.html"
    page.write_text(
        without_policy(hostile).replace("</body>", f"<script>{note}</script></body>"), encoding="utf-8"
    )
    assert BROWSER is not None
    (root,) = re.findall(r"<html[^>]*>", dump_dom(BROWSER, page))
    assert 'data-at="0 "' in root


@pytest.mark.slow
@pytest.mark.skipif(
    BROWSER is None, reason="no Chromium or Chrome here: the page is not looked at in a browser"
)
def test_in_a_browser_the_policy_stops_what_would_slip_through(hostile: str, tmp_path: Path):
    html = hostile.replace("</body>", f"<script>{RUN}</script><img src=x onerror='{RUN}'></body>")
    assert pwned(dom_of(without_policy(html), tmp_path)), "it runs where nothing forbids it"
    dom = dom_of(html, tmp_path)
    assert not pwned(dom)
    assert "data-heights" in dom, "the page's own scripts have run"
