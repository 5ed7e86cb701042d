"""Completion scripts: what bash makes of ours, and that they name what there is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from aen_lightning.cli.completion import options_of_commands, script
from aen_lightning.cli.main import COMMANDS, main
from aen_lightning.cli.recipes import recipes


@pytest.fixture
def complete(tmp_path: Path):
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    (tmp_path / "aen.bash").write_text(script("bash"))
    (tmp_path / "some.yaml").write_text("")

    def run(*words: str) -> set[str]:
        code = 'source aen.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _aen; printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(
            ["bash", "-c", code, "bash", *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return set(done.stdout.split())

    return run


def test_bash_completes_commands_options_recipes_and_files(complete) -> None:
    assert complete("aen", "") == {name.split()[0] for name in COMMANDS} | {"--help", "--version"}
    assert complete("aen", "ev") == {"evaluate"}
    assert complete("aen", "shards", "") >= {"verify", "info", "convert"}
    assert complete("aen", "shards", "convert", "--d") == {"--dtype"}
    assert complete("aen", "evaluate", "--n_") == {"--n_rows", "--n_tokens", "--n_downstream_rows"}
    assert complete("aen", "fit", "--model.sae.weight_m") == {
        "--model.sae.weight_min",
        "--model.sae.weight_max",
    }
    assert complete("aen", "fit", "--config", "") == {*recipes(), "some.yaml", "aen.bash"}
    assert complete("aen", "report", "so") == {"some.yaml"}


def test_every_command_and_its_options_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of_commands()
    assert options.keys() == COMMANDS.keys()
    assert "--trainer.max_steps" in options["fit"]
    assert "--shards.path" in options["harvest"]
    assert main(["completion", "fish"]) == 0
    fish = capsys.readouterr().out
    assert "complete -c aen -n '__fish_seen_subcommand_from evaluate' -l n_rows\n" in fish
    assert main(["completion", "zsh"]) == 0
    assert "bashcompinit" in capsys.readouterr().out
