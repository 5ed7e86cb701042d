from __future__ import annotations

from pathlib import Path

import pytest

from aen_lightning.runs import Curves, read_curves, read_sweep


def curves_of(folder: Path, text: str) -> Curves:
    (folder / "metrics.csv").write_text(text)
    found = read_curves(folder)
    assert found is not None
    return found


def test_a_curve_has_its_steps_and_no_gaps(tmp_path: Path):
    found = curves_of(tmp_path, "epoch,metrics/l0,step,val/metrics/l0\n0,4,9,\n0,,9,3\n0,2,19,\n")
    assert {key: list(series.items()) for key, series in found.of().items()} == {
        "metrics/l0": [(9, 4.0), (19, 2.0)],
        "val/metrics/l0": [(9, 3.0)],
    }


def test_a_step_that_a_resumed_run_logged_again_counts_as_it_was_logged_last(tmp_path: Path):
    found = curves_of(tmp_path, "metrics/l0,step\n5,0\n4,10\n3,20\n44,10\n33,20\n")
    assert list(found.of()["metrics/l0"].items()) == [(0, 5.0), (10, 44.0), (20, 33.0)]


def test_each_sae_of_a_run_has_its_columns_and_those_of_all(tmp_path: Path):
    found = curves_of(
        tmp_path,
        "step,a/metrics/l0,b/metrics/l0,a/val/metrics/l0,test/b/downstream/kl,test/raw/cosine,losses/mse_loss,lr\n"
        "1,2,3,4,5,6,7,8\n",
    )
    assert found.names == ["a", "b"]
    shared = {"test/raw/cosine": 6.0, "losses/mse_loss": 7.0}
    assert found.last("a") == shared | {"metrics/l0": 2.0, "val/metrics/l0": 4.0}
    assert found.last("b") == shared | {"metrics/l0": 3.0, "test/downstream/kl": 5.0}
    assert found.last() == shared


def test_held_out_metrics_and_those_of_training(tmp_path: Path):
    found = curves_of(
        tmp_path,
        "step,metrics/l0,sparsity/dead_features,val/metrics/l0,test/metrics/l0,test/features/gini\n1,2,3,4,5,6\n",
    )
    assert found.held_out() == {"l0": 4.0, "test/l0": 5.0, "test/features/gini": 6.0}
    assert found.in_training() == {"metrics/l0": 2.0, "sparsity/dead_features": 3.0}


def test_steps_and_samples_are_those_of_training(tmp_path: Path):
    found = curves_of(
        tmp_path, "step,details/n_training_samples,val/metrics/l0\n9,4096,\n19,8192,\n20,,3\n"
    )  # a validation after the fit is logged one step on
    assert (found.n_training_steps, found.n_training_samples) == (20, 8192)
    bare = curves_of(tmp_path, "step,metrics/l0\n9,1\n")
    assert (bare.n_training_steps, bare.n_training_samples) == (None, None)


def test_a_run_that_diverged_is_not_reported_by_what_came_before(tmp_path: Path):
    last = curves_of(tmp_path, "step,metrics/mse\n1,0.5\n2,nan\n").last()["metrics/mse"]
    assert last != last


def test_what_is_no_metrics_csv_is_refused(tmp_path: Path):
    assert read_curves(tmp_path) is None
    for text in ("", "a,b\n1,2\n"):
        with pytest.raises(ValueError, match=r"metrics\.csv has no column 'step'"):
            curves_of(tmp_path, text)
    with pytest.raises(ValueError, match=r"metrics\.csv is no CSV file"):
        curves_of(tmp_path, "step,a\n1,2\n1,2,3,4\n")


def test_the_table_of_a_sweep_keeps_names_that_look_like_numbers(tmp_path: Path):
    assert read_sweep(tmp_path) is None
    (tmp_path / "sweep.csv").write_text("name,l0,k\n007,1.5,2\nNA,2.5,\n")
    table = read_sweep(tmp_path)
    assert table is not None
    assert list(table.index) == ["007", "NA"]
    assert list(table["l0"]) == [1.5, 2.5]
    (tmp_path / "sweep.csv").write_text("l0\n1\n")
    with pytest.raises(ValueError, match=r"sweep\.csv has no column 'name'"):
        read_sweep(tmp_path)
