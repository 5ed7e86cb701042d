from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens import SAE
from safetensors.torch import save_file
from torch.testing import assert_close

from aen_lightning.report import collect, make_figures
from aen_lightning.report.drawing import MAX_POINTS, log_axis, thin
from aen_lightning.training.module import SweepModule
from aen_lightning.training.pareto import pareto_fronts
from tests.support.report_pages import written


def test_the_page_holds_the_numbers_of_metrics_csv(sweep: tuple[Path, SweepModule]):
    folder, module = sweep
    page = written([folder])
    with (folder / "metrics.csv").open() as f:
        rows = list(csv.DictReader(f))
    labels = ["AEN λ₁=0.0025", "AEN λ₁=0.025", "L1", "TopK k=2", "TopK k=4"]  # l1 / d_in, by hand
    curves = page.traces("training")
    assert {t["legendgroup"] for t in curves} == set(labels)
    for key, axis, factor in (
        ("metrics/l0", "y2", 1),
        ("losses/mse_loss", "y3", 1),
        ("sparsity/recovery_rate", "y3", 100),
    ):
        traces = curves if factor == 1 else page.traces("dead")
        for label, member in zip(labels, module.members, strict=True):
            column = f"{member.name}/{key}"
            expected = {int(r["step"]): factor * float(r[column]) for r in rows if r[column]}
            (trace,) = [
                t for t in traces if t["legendgroup"] == label and t["yaxis"] == axis and t["mode"] == "lines"
            ]
            assert trace["x"] == list(expected)
            assert trace["y"] == pytest.approx(list(expected.values()), rel=1e-12)
    silent = next(t for t in page.traces("dead") if t["legendgroup"] == "TopK k=2" and t["yaxis"] == "y")["y"]
    counts = [float(n) for r in rows if (n := r[f"{module.members[3].name}/sparsity/dead_features"])]
    assert silent == pytest.approx([100 * c / 24 for c in counts])


def test_validation_is_drawn_as_points_beside_the_lines(sweep: tuple[Path, SweepModule]):
    folder, module = sweep
    table = pd.read_csv(folder / "metrics.csv")
    expected = table[f"{module.members[0].name}/val/metrics/explained_variance"].dropna()
    points = [
        t
        for t in written([folder]).traces("training")
        if t["mode"] == "markers" and t.get("yaxis", "y") == "y"
    ]
    assert len(points) == 5
    assert points[0]["y"] == pytest.approx(list(expected))


def test_the_table_and_the_fronts_are_those_of_the_sweep(sweep: tuple[Path, SweepModule]):
    folder, _ = sweep
    table = pd.read_csv(folder / "sweep.csv")
    page = written([folder])
    for value in table["explained_variance"]:
        assert f"{value:.4g}" in page.text
    points = {}
    for trace in page.traces("pareto-dead-features-pct"):
        if trace["mode"] == "markers":
            points[trace["name"]] = sorted(zip(trace["x"], trace["y"], strict=True))
    families = table.assign(architecture=["AEN", "AEN", "L1", "TopK", "TopK"])
    for family, mine in families.groupby("architecture"):
        assert points[family] == sorted(zip(mine["l0"], mine["dead_features_pct"], strict=True))
    front = pareto_fronts(families, "explained_variance", higher_is_better=True)
    lines = [t for t in page.traces("pareto-explained-variance") if t["mode"] == "lines"]
    assert {t["legendgroup"]: t["x"] for t in lines} == {
        f: [p["l0"] for p in points] for f, points in front.items() if len(points) > 1
    }


def test_adaptive_weights_are_those_of_the_module_and_others_have_none(sweep: tuple[Path, SweepModule]):
    folder, module = sweep
    found = collect([folder]).dictionaries
    for d in found[:2]:
        assert_close(torch.from_numpy(d.l1_weights()), module.saes[d.name].l1_weights)
        assert d.l1_weights().max() > 1.2  # the ramp has begun
    assert [d.l1_weights() for d in found[2:]] == [None] * 3
    traces = written([folder]).traces("weights")
    assert [t["legendgroup"] for t in traces] == [d.label for d in found[:2]]
    assert sum(traces[0]["y"]) == pytest.approx(100)
    assert f"{(found[0].l1_weights() >= 10).mean():.1%} at the maximum 10" in traces[0]["hovertemplate"]
    assert {t["legendgroup"] for t in written([folder]).traces("adaptive")} == {d.label for d in found[:2]}


def test_adaptive_weights_are_read_beside_the_dictionary_and_nowhere_else(
    sweep: tuple[Path, SweepModule], tmp_path: Path
):
    folder = collect([sweep[0]]).dictionaries[0].folder
    assert folder is not None
    run = tmp_path / "run"
    shutil.copytree(folder, run / "sae" / "final")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").write_bytes(b"not read")
    assert len(written([run]).traces("weights")) == 1
    (run / "sae" / "final" / "adaptive_state.safetensors").unlink()
    report = collect([run])
    assert "weights" not in [figure.id for figure in make_figures(report)]
    assert (
        "run has no adaptive_state.safetensors with L1 weights beside it: they are not shown." in report.notes
    )


def test_density_accounts_for_every_feature(sweep: tuple[Path, SweepModule], tmp_path: Path):
    folder = collect([sweep[0]]).dictionaries[0].folder
    assert folder is not None
    SAE.load_from_disk(folder).save_model(tmp_path / "d")
    rates = np.array([0.0] * 6 + [1e-4] * 6 + [0.05] * 6 + [1.0] * 6)
    save_file(
        {"sparsity": torch.tensor(np.log10(rates + 1e-10)).float()}, tmp_path / "d" / "sparsity.safetensors"
    )
    histogram, bar = written([tmp_path / "d"]).traces("density")
    assert sum(histogram["y"]) == pytest.approx(75)
    assert bar["x"] == pytest.approx([25])
    assert sorted(histogram["y"])[-3:] == pytest.approx([25, 25, 25])


def test_the_geometry_is_that_of_the_dictionary(sweep: tuple[Path, SweepModule]):
    folder, module = sweep
    W = torch.nn.functional.normalize(module.saes[module.members[3].name].W_dec.detach().double(), dim=-1)
    nearest = (W @ W.T).fill_diagonal_(0).abs().max(dim=-1).values
    expected = 100 * np.histogram(nearest.numpy(), np.linspace(0, 1, 51))[0] / 24
    assert written([folder]).traces("geometry")[3]["y"] == pytest.approx(list(expected))
    report = collect([folder])
    assert "geometry" not in [f.id for f in make_figures(report, max_geometry_features=23)]
    assert "--max_geometry_features" in report.notes[-1]


def test_log_axes_have_plain_numbers_and_thinning_keeps_the_ends():
    axis = log_axis([3.0, 40.0, None, 0.0])
    assert axis["range"][0] < np.log10(3) < np.log10(40) < axis["range"][1]
    assert {"5", "10", "20"} <= set(axis["ticktext"])
    series = thin(pd.Series(range(5 * MAX_POINTS)))
    assert (len(series), series.iloc[0], series.iloc[-1]) == (MAX_POINTS, 0, 5 * MAX_POINTS - 1)
