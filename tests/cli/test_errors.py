"""Every slip ends with one line and code 2: ``wrong_inputs.txt`` has a command and the line it must give.

``…`` stands for any text, where the words are another room's or another library's.
"""

from __future__ import annotations

import logging
import re
import shlex
import sys
from pathlib import Path

import pytest

from aen_lightning.cli.errors import UsageError, explain
from aen_lightning.cli.main import _load_libraries, main

_TABLE = (Path(__file__).parent / "wrong_inputs.txt").read_text(encoding="utf-8")
CASES = [tuple(block.strip().split("\n")) for block in re.findall(r"^\$ (.*\n.*)$", _TABLE, re.MULTILINE)]

_SPIKED = (
    "data: {class_path: aen_lightning.data.SpikedDataModule, init_args: {d_in: 32, n_features: 64, k: 4}}\n"
)
_FILES = {
    "empty.yaml": "",
    "list.yaml": "- 1\n",
    "broken.yaml": "trainer: {max_steps: 3\n",
    "typo.yaml": "modle: {}\n",
    "taken.yaml": "x",
    "text.txt": "hello\n",
    "junk.pt": "junk",
    "nodict/cfg.json": "[1]",
    "unknown.yaml": "trainer: {max_stepps: 3}\nmodel: {sae: {d_in: 32, d_sae: 64}}\n" + _SPIKED,
    "section.yaml": "trianer: {max_steps: 3}\nmodel: {sae: {d_in: 32, d_sae: 64}}\n" + _SPIKED,
    "notrainer.yaml": "trainer:\n  # max_steps: 3\nmodel: {sae: {d_in: 32, d_sae: 64}}\n" + _SPIKED,
    "init.yaml": "model: {sae: {d_in: 32, d_sae: 64}}\n" + _SPIKED.replace("{d_in", "{d_inn"),
    "strong.yaml": "model: {sae: {d_in: 32, d_sae: 64, lambda_1: strong}}\n" + _SPIKED,
    "callback.yaml": "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.ModelCheckpoint, "
    "init_args: {monitr: x}}]}\nmodel: {sae: {d_in: 32, d_sae: 64}}\n" + _SPIKED,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in _FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "notyaml.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["aen"])
    # Lightning's handler may hold a stream that pytest has closed since; that is no slip of the user's
    monkeypatch.setattr(logging, "raiseExceptions", False)
    return tmp_path


def test_the_table_is_read_whole() -> None:
    assert len(CASES) == _TABLE.count("$ aen") > 120


@pytest.mark.parametrize(("command", "line"), CASES, ids=[command for command, _ in CASES])
def test_wrong_use_ends_with_its_line(
    command: str, line: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _load_libraries()  # the first command of a process would say that it does
    capsys.readouterr()
    before = set(files_below(folder))
    program, *words = shlex.split(command)
    assert program == "aen"
    assert main(words) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(".*".join(map(re.escape, line.split("…"))), error), error
    assert set(files_below(folder)) == before


def files_below(folder: Path) -> list[Path]:
    """Without a run's logs: where a slip shows only once the data are there, Lightning has opened them."""
    return [path for path in folder.rglob("*") if path.is_file() and "version_0" not in path.parts]


def test_the_traceback_is_there_for_those_who_ask(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AEN_DEBUG", "1")
    with pytest.raises(UsageError, match="nowhere") as raised:
        main(["evaluate", "nowhere"])
    assert isinstance(raised.value.__cause__, FileNotFoundError)


def test_an_error_after_the_first_step_is_no_error_of_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aen_lightning.training.module import SAEModule

    def fail(self: SAEModule) -> None:
        raise ValueError("lost in the middle")

    monkeypatch.setattr(SAEModule, "on_train_epoch_end", fail)
    args = ["fit", "--config", "debug", "--trainer.max_steps=2", "--trainer.enable_progress_bar=false"]
    with pytest.raises(ValueError, match=r"^lost in the middle$") as raised:
        main(args)
    assert not isinstance(raised.value, UsageError)


def test_an_interrupt_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("aen_lightning.cli.recipes.recipes", interrupt)
    assert main(["recipes", "list"]) == 130
    assert capsys.readouterr().err == "aen recipes list: interrupted\n"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "unrecognized arguments: --model.gamma=1 --b",
            "no option --model.gamma (did you mean '--model.sae.gamma'?)",
        ),
        ("unrecognized arguments: --gamma", "no option --gamma (did you mean '--model.sae.gamma'?)"),
        (
            "Group 'model' does not accept option 'rl'",
            "no key 'model.rl' in the config (did you mean 'model.lr'?)",
        ),
        ("argument -c/--config: expected one\n  argument", "--config: expected one argument"),
        ("the following arguments are required: fit.model.sae, fit.data", "missing model.sae, data"),
        ("something\n  that nobody foresaw", "something that nobody foresaw"),
    ],
)
def test_messages_of_jsonargparse_are_put_into_our_words(message: str, line: str) -> None:
    assert explain(message, ["model.lr", "model.sae", "model.sae.gamma", "trainer.x"]) == line


def test_a_long_value_is_cut() -> None:
    line = explain(f"Parser key \"model.lr\":\n  Expected a <class 'float'>. Got value: {'long ' * 100}", [])
    assert line.startswith("model.lr: expected float, got 'long long")
    assert len(line) < 130
