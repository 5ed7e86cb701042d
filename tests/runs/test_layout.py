from __future__ import annotations

from pathlib import Path

import pytest

from aen_lightning.runs.layout import export_folder, is_run, run_of, step_folder, versions


def made(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(parents=True)


def test_versions_are_in_the_order_of_their_numbers(tmp_path: Path):
    made(*(tmp_path / name for name in ("version_10", "version_9", "version_x", "other")))
    (tmp_path / "version_11").touch()
    assert [folder.name for folder in versions(tmp_path)] == ["version_9", "version_10"]


def test_the_end_of_a_run_comes_before_its_last_step(tmp_path: Path):
    assert export_folder(tmp_path) is None
    made(*(tmp_path / "sae" / step_folder(step) for step in (9, 100, 20)))
    assert export_folder(tmp_path) == tmp_path / "sae" / "step_100"
    made(tmp_path / "sae" / "final")
    assert export_folder(tmp_path) == tmp_path / "sae" / "final"


@pytest.mark.parametrize(
    ("folder", "name"),
    [("sae/final", ""), ("sae/step_20", ""), ("sae/final/a", "a"), ("sae/step_3/a-k=2", "a-k=2")],
)
def test_the_run_of_a_dictionary_and_its_name_there(tmp_path: Path, folder: str, name: str):
    assert run_of(tmp_path / "run" / folder) == (tmp_path / "run", name)


@pytest.mark.parametrize("folder", ["final", "sae", "sae/other", "sae/step_x"])
def test_other_folders_are_of_no_run(tmp_path: Path, folder: str):
    assert run_of(tmp_path / folder) == (None, "")


def test_a_run_has_curves_or_dictionaries(tmp_path: Path):
    made(tmp_path / "a" / "sae", tmp_path / "b", tmp_path / "c")
    (tmp_path / "b" / "metrics.csv").touch()
    assert [is_run(tmp_path / name) for name in "abc"] == [True, True, False]
