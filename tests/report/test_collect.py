from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.report import collect, make_figures, render_report
from aen_lightning.report.drawing import MAX_POINTS
from aen_lightning.report.naming import family_of, has_own_weights
from aen_lightning.training.module import SAEModule, SweepModule
from tests.support.commands import evaluate_command
from tests.support.report_pages import GRID, Page, make_run_trainer
from tests.support.runs import make_run


def test_one_run_with_a_resumed_and_a_long_curve(sweep: tuple[Path, SweepModule], tmp_path: Path):
    run = tmp_path / "version_3"
    (tmp_path / "version_10").mkdir()
    run.mkdir()
    steps = [*range(0, 6000, 2), 5998]  # the last step was logged again after a restart
    lines = [f"{s},{s / 10},{'' if s else 0.5}" for s in steps]
    lines[-1] = "5998,1234.5,"
    (run / "metrics.csv").write_text("step,losses/mse_loss,metrics/l0\n" + "\n".join(lines) + "\n")
    report = collect([run])
    (trace,) = [
        t
        for t in Page(render_report(report, make_figures(report))).traces("training")
        if t["mode"] == "lines"
    ]
    assert len(trace["y"]) == MAX_POINTS
    assert (trace["x"][0], trace["x"][-1], trace["y"][-1]) == (0, 5998, 1234.5)
    assert "exported no dictionary" in report.notes[0]
    assert report.dictionaries[0].metrics == {"l0": 0.5}
    with pytest.raises(FileNotFoundError, match=r"version_10 holds no run: expected what aen fit"):
        collect([tmp_path])
    (tmp_path / "version_10").rmdir()
    (tmp_path / "version_0").mkdir()
    assert "the last, version_3" in collect([tmp_path]).notes[0]


def test_a_run_of_one_sae_has_its_label_and_its_last_validation(tmp_path: Path):
    module = SAEModule({**GRID[0], "l1_coefficient": 0.02}, lr=3e-3)
    data = SpikedDataModule(d_in=8, n_features=24, k=2, train_batch_size_tokens=32, n_eval_samples=128)
    make_run_trainer(tmp_path / "alone").fit(module, datamodule=data)
    (d,) = collect([tmp_path / "alone"]).dictionaries
    assert (d.label, d.family, d.metrics_source) == ("alone/version_0", "AEN", "validation, last")
    last = pd.read_csv(tmp_path / "alone" / "version_0" / "metrics.csv")["val/metrics/l0"].dropna().iloc[-1]
    assert d.metrics["l0"] == last
    assert d.settings["lambda_1"] == pytest.approx(0.02 / 8)
    assert_close(torch.from_numpy(d.l1_weights()), module.sae.l1_weights)


def test_results_of_other_commands_find_their_dictionary(
    dictionary: Path, sweep: tuple[Path, SweepModule], tmp_path: Path
):
    result = tmp_path / "mine.json"
    evaluate_command(
        [
            str(dictionary),
            "--out",
            str(result),
            "--n-rows",
            "6",
            "--held-out-documents",
            "20",
            "--n-downstream-rows",
            "2",
        ]
    )
    content = json.loads(result.read_text())
    report = collect([dictionary, sweep[0]], [result])
    assert report.dictionaries[0].evaluation == content
    page = Page(render_report(report, make_figures(report)))
    kl = content["downstream"]["kl"]["spliced"]
    assert f"{kl['value']:.4g} ± {kl['se']:.2g}" in page.text
    with pytest.raises(ValueError, match=r"mine\.json is about .* which is no dictionary of this report"):
        collect([sweep[0]], [result])
    result.write_text("{}")
    with pytest.raises(ValueError, match=r"mine\.json is no result of aen evaluate"):
        collect([dictionary], [result])
    result.write_text("not json")
    with pytest.raises(ValueError, match=r"mine\.json is not JSON"):
        collect([dictionary], [result])


@pytest.mark.parametrize(
    ("settings", "family", "own_weights"),
    [
        ({"gamma": 0.5, "lambda_2": 1e-4, "starvation_guard": 0.0}, "AEN", True),
        ({"gamma": 0.0, "lambda_2": 0.0}, "L1", False),
        ({"gamma": 0.0, "lambda_2": 0.0, "starvation_guard": 0.1}, "L1 + guard", True),
        ({"gamma": 0.5, "lambda_2": 0.0, "starvation_guard": 0.1}, "adaptive lasso + guard", True),
        ({"gamma": 0.0, "lambda_2": 0.0, "hard_k": 4, "hard_finish": "topk"}, "L1, then TopK", False),
        # what a stranger's config may hold
        (
            {"gamma": 0.0, "lambda_2": 0.0, "hard_k": 4, "hard_finish": {"a": [1]}},
            "L1, then BatchTopK",
            False,
        ),
    ],
)
def test_the_family_says_whether_there_was_a_guard(settings: dict[str, Any], family: str, own_weights: bool):
    assert family_of("aen", settings) == family
    assert has_own_weights(settings) == own_weights


def test_labels_of_runs_that_look_alike_are_told_apart(tmp_path: Path):
    for run in ("one", "two"):
        folder = tmp_path / run
        folder.mkdir()
        (folder / "metrics.csv").write_text("step,a/metrics/l0,b/metrics/l0\n1,2,3\n")
    labels = [d.label for d in collect([tmp_path / "one", tmp_path / "two"]).dictionaries]
    assert labels == ["one: a", "one: b", "two: a", "two: b"]


def test_a_report_on_a_run_below_says_nothing_of_the_folders_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_run(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    report = collect([Path("runs/mine")])
    html = render_report(report, make_figures(report))
    assert str(tmp_path) not in html
    assert "runs/mine/sae/final" in html
