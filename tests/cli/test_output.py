"""``--quiet`` and ``--json``: what goes where."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from aen_lightning.cli.main import COMMANDS, help_page, main
from aen_lightning.cli.output import answer, is_quiet, remark, spoken, wants_json


def test_where_answers_and_remarks_go(capsys: pytest.CaptureFixture[str]) -> None:
    results = {}
    for options in ((), ("--json",), ("--quiet",), ("--quiet", "--json")):
        with spoken(frozenset(options)):
            remark("by the way")
            answer({"x": float("nan"), "y": [1, (2.5, float("inf"))]}, lambda: "x is not known")
        results[options] = tuple(capsys.readouterr())
    as_json = '{"x": null, "y": [1, [2.5, null]]}\n'
    assert results == {
        (): ("by the way\nx is not known\n", ""),
        ("--json",): (as_json, "by the way\n"),
        ("--quiet",): ("x is not known\n", ""),
        ("--quiet", "--json"): (as_json, ""),
    }
    assert not wants_json()
    assert not is_quiet()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.setattr(sys, "argv", ["aen"])
    monkeypatch.chdir(tmp_path)
    words = ["--trainer.max_steps=20", "--trainer.val_check_interval=10", "--trainer.default_root_dir=runs"]
    assert main(["fit", "--config", "debug", *words]) == 0
    (tmp_path / "out.txt").write_text(capsys.readouterr().out)
    return tmp_path


def test_a_fit_ends_with_what_came_out_where_it_lies_and_what_is_next(run: Path) -> None:
    first, *rest = (run / "out.txt").read_text().splitlines()
    assert first.startswith("20 steps: L0 ")
    assert ", explained variance " in first
    assert ", dead features 0 % (validation)" in first
    assert rest == [
        "run         runs/version_0 (metrics.csv, config.yaml, checkpoints)",
        "dictionary  runs/version_0/sae/final",
        "next        aen evaluate runs/version_0/sae/final",
        "            aen report runs/version_0",
    ]


def answered(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found: dict[str, object] = json.loads(line)
    return found


def test_what_a_fit_says_to_do_next_can_be_done(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answered(capsys, "evaluate", "runs/version_0/sae/final")
    (result,) = found["results"]  # type: ignore[misc]
    assert result["ground_truth"]["matched_cosine"] > 0
    assert result == json.loads((run / "runs/version_0/sae/final/evaluation.json").read_text())
    assert main(["report", "runs/version_0", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert (run / "report.html").is_file()


def test_answers_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", "debug", "--trainer.max_steps=4", "--trainer.default_root_dir=more"]
    fit = answered(capsys, *words, "--trainer.val_check_interval=4")
    assert fit["steps"] == 4
    assert fit["metrics_from"] == "validation"
    assert set(fit["metrics"]) >= {"l0", "explained_variance", "dead_features_pct"}  # type: ignore[call-overload]
    for key in ("folder", "dictionary", "checkpoint"):
        assert Path(str(fit[key])).exists()
    validate = answered(
        capsys, "validate", "--config", "debug", f"--ckpt_path={fit['checkpoint']}",
        "--trainer.default_root_dir=more",
    )  # fmt: skip
    assert validate["metrics"] == pytest.approx(fit["metrics"])
    assert answered(capsys, "plan", "--config", "debug")["numbers"]["sae_parameters"] == 4192  # type: ignore[index]
    assert "debug" in answered(capsys, "recipes", "list")
    dictionaries = ["runs/version_0/sae/final", "more/version_0/sae/final"]
    compared = answered(capsys, "compare", *dictionaries)
    assert len(compared["pairs"]) == 1  # type: ignore[arg-type]
    diagnosed = answered(capsys, "diagnose", dictionaries[0], "--only", "coherence", "--no_inputs")
    assert diagnosed["command"] == "diagnose"


def test_without_a_checkpoint_one_is_told_that_the_sae_is_not_trained(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", "--config", "debug", "--trainer.default_root_dir=runs"]) == 0
    assert "random weights" in capsys.readouterr().out.splitlines()[0]


def test_commands_that_take_json_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        if command.parser != "none":
            page = help_page(name)
            assert ("\n  --json " in page) == command.json
            assert "\n  --quiet " in page
    assert main(["push", "a", "b/c", "--json"]) == 2
    assert capsys.readouterr().err.startswith(
        "aen push: error: no option --json; it is one of fit, validate,"
    )
