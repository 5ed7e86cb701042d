"""The recipes: listed, shown, copied, each parsed by the command it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from aen_lightning.cli.main import main
from aen_lightning.cli.recipes import find_config, recipes
from aen_lightning.saes.from_dict import build_sae_config
from aen_lightning.training.grid import expand_grid


def test_recipes_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes())
    assert all(len(line.split()) > 5 for line in lines), (
        "each recipe starts with a comment that says what it is"
    )
    assert main(["recipes", "list"]) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_a_recipe_is_shown_by_name_or_as_it_lies_in_the_repository(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = recipes()["debug"].read_text()
    for name in ("debug", "debug.yaml", "recipes/debug.yaml"):
        assert main(["recipes", "show", name]) == 0
        assert capsys.readouterr().out == text


def test_a_recipe_is_copied_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "spiked"]) == 0
    assert capsys.readouterr().out == "spiked.yaml\n"
    assert main(["recipes", "copy", "spiked", "mine.yaml"]) == 0
    assert Path("mine.yaml").read_text() == Path("spiked.yaml").read_text() == recipes()["spiked"].read_text()
    Path("mine.yaml").write_text("mine")
    assert main(["recipes", "copy", "debug", "mine.yaml"]) == 2
    assert Path("mine.yaml").read_text() == "mine"


def test_a_file_comes_before_a_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("debug").write_text("mine")
    assert find_config("debug") == Path("debug")
    assert find_config("debug.yaml") == recipes()["debug"]
    with pytest.raises(FileNotFoundError, match="elsewhere/debug"):
        find_config("elsewhere/debug")


def _command_of(name: str) -> str:
    last = name.rpartition("-")[2]
    return last if last in ("harvest", "refit", "sweep") else "fit"


@pytest.mark.parametrize("name", list(recipes()))
def test_every_recipe_says_how_to_run_it_and_passes_its_parser(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = recipes()[name].read_text()
    command = _command_of(name)
    assert f"aen {command} --config {name}" in text or f"{command} --config {name}" in text
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--config", name, "--print_config"])
    assert exit_info.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(text)
    assert printed["trainer"]["devices"] == given["trainer"]["devices"]
    sae = given["model"].get("sae")
    if sae is not None:
        assert printed["model"]["sae"] == sae, "the short dict form stays as it is"
        assert all(build_sae_config(member.sae).d_sae >= 2 for member in expand_grid(sae, seed=0))
