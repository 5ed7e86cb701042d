from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest

from aen_lightning.report.browser import dump_dom, find_browser, measure, take_pictures
from aen_lightning.training.module import SweepModule
from tests.support.commands import report_command
from tests.support.report_pages import Page

BROWSER = find_browser()
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium or Chrome here: the page is not looked at in a browser"
)


@pytest.fixture(scope="module")
def page_of_everything(
    sweep: tuple[Path, SweepModule], dictionary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    arguments = [
        str(sweep[0]),
        str(dictionary),
        "--features_of",
        str(dictionary),
        "--n-rows",
        "8",
        "--held-out-documents",
        "20",
    ]
    assert report_command([*arguments, "-o", str(path)]) == 0
    return path


def test_without_a_browser_the_report_is_written_and_says_so(
    dictionary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (
        report_command([str(dictionary), "-o", str(tmp_path / "r.html"), "--png", str(tmp_path / "png")]) == 0
    )
    assert "no pictures: there is no chromium" in capsys.readouterr().out
    assert (tmp_path / "r.html").is_file()
    assert not (tmp_path / "png").exists()


@pytest.mark.slow
@needs_browser
def test_in_a_browser_every_figure_is_drawn_and_features_are_searched(page_of_everything: Path):
    assert BROWSER is not None
    data = Page(page_of_everything.read_text(encoding="utf-8")).data
    figures, (features,) = json.loads(data["figure-data"]), json.loads(data["feature-data"])
    dom = dump_dom(BROWSER, page_of_everything)
    for figure in figures:
        start = dom.index(f'id="plot-{figure["id"]}"')
        assert "main-svg" in dom[start : start + 2000], figure["id"]
    rows = re.findall(r'<tr class="row"[^>]*id="feature-(\d+)"', dom)
    assert {int(r) for r in rows} == {f["id"] for f in features["features"]}
    wanted = features["features"][0]
    dom = dump_dom(BROWSER, page_of_everything, f"q={wanted['id']}")
    assert re.findall(r'<tr class="row"[^>]*id="feature-(\d+)"', dom) == [str(wanted["id"])]
    assert "Where it is strongest" in dom  # a single hit is unfolded
    assert f"1 of {len(features['features'])} features" in dom
    linked = dump_dom(BROWSER, page_of_everything, f"feature-{wanted['id']}")
    assert re.findall(r'<tr class="row"[^>]*id="feature-(\d+)"', linked) == [str(wanted["id"])]
    assert linked.count('class="histogram"') == 2
    for other, _ in wanted["neighbours"] + wanted["together"]:
        assert f'href="#feature-{other}"' in linked
    assert "feature 999 is not on this page" in dump_dom(BROWSER, page_of_everything, "feature-999")


@pytest.mark.slow
@needs_browser
def test_pictures_have_the_size_of_what_they_show_and_are_not_blank(page_of_everything: Path, tmp_path: Path):
    assert BROWSER is not None
    heights = measure(BROWSER, page_of_everything, "open=2&rows=24")
    _, picture = take_pictures(BROWSER, page_of_everything, tmp_path / "png", ["training"])
    content = picture.read_bytes()
    width, height = struct.unpack(">II", content[16:24])  # of a PNG's first chunk
    assert (width, height) == (1280, heights["legend"] + heights["training"] + 30)
    assert len(content) > 40_000  # a blank page of this size takes 5 kB
