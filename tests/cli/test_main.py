"""The command itself: what it is called with, and that nothing heavy is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import aen_lightning
from aen_lightning.cli.main import COMMANDS, main

ROOT = Path(aen_lightning.__file__).parents[1]


def test_help_names_every_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert "0 done" in out
    assert "2 wrong use" in out
    assert main([]) == 0
    assert capsys.readouterr().out == out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"aen-lightning {aen_lightning.__version__}\n"


def test_a_group_lists_its_own_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "--help"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("  ")] == [
        "verify",
        "info",
        "convert",
    ]


@pytest.mark.parametrize("name", [name for name, c in COMMANDS.items() if c.parser != "none"])
def test_every_command_has_help_and_needs_neither_torch_nor_a_network_for_it(name: str) -> None:
    # in a process each: here everything is imported already
    code = (
        "import sys\nfrom aen_lightning.cli.main import main\n"
        "try: code = main([*sys.argv[1:], '--help'])\nexcept SystemExit as e: code = e.code\n"
        "heavy = {'torch', 'lightning', 'sae_lens', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    command = [sys.executable, "-c", code, *name.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: aen {name}")
    assert done.stderr == ""


@pytest.mark.parametrize("words", [["fti"], ["recipes"], ["evaluate", "a", "--n_rwos=1"], ["push"]])
def test_slips_need_no_torch_either(words: list[str]) -> None:
    code = (
        "import sys\nfrom aen_lightning.cli.main import main\nmain(sys.argv[1:])\n"
        "assert not {'torch', 'lightning', 'sae_lens', 'numpy'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, timeout=60, check=True, capture_output=True
    )


@pytest.mark.parametrize("cwd", [ROOT, Path("/")], ids=["from the root", "from elsewhere"])
def test_callbacks_and_recipes_are_parts_of_the_package_and_nothing_else(cwd: Path) -> None:
    code = (
        "import importlib.util, pathlib, sys\n"
        "from aen_lightning.cli.recipes import recipes\n"
        "assert 'debug' in recipes()\n"
        "assert importlib.util.find_spec('aen_lightning.callbacks')\n"
        "sys.path = [p for p in sys.path if not pathlib.Path(p, 'pyproject.toml').is_file()]  # no source tree\n"
        "assert importlib.util.find_spec('callbacks') is None and importlib.util.find_spec('recipes') is None"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_python_dash_m_is_the_command() -> None:
    command = [sys.executable, "-m", "aen_lightning", "recipes", "show", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("aen recipes show: error: no config file or recipe 'nothing'")
