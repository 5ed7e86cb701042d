"""Parsers out of signatures, on functions of the test's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from aen_lightning.cli.errors import UsageError
from aen_lightning.cli.parser import make_parser, normalized, run_function

CALLS: list[dict[str, Any]] = []


@dataclass(frozen=True, kw_only=True)
class Group:
    """Options of a group.

    Args:
        files: Some files.
        n_rows: How many rows.
        keep: Keep it, or not, or as it was.
    """

    files: list[str] | None = None
    n_rows: int = 3
    keep: bool | None = None


def command(
    source: list[str],
    *,
    out: str | None = None,
    kind: Literal["a", "b"] = "a",
    thresholds: list[float] = [0.5],  # noqa: B006
    fast: bool = False,
    sure: bool = True,
    group: Group = Group(),
) -> None:
    """Do it.

    At length.

    Args:
        source: What to ``read``.
        out: Where to.
        kind: Of which kind.
        thresholds: Some numbers.
        fast: Hurry.
        sure: Be certain.
        group: The others.
    """
    CALLS.append(locals())


def optional(name: str, file: str | None = None) -> None:
    """Take one or two words."""
    CALLS.append({"name": name, "file": file})


def call(function: Any, text: str) -> dict[str, Any]:
    CALLS.clear()
    run_function(function, text.split(), prog="aen it")
    (found,) = CALLS
    return found


def test_without_options_the_defaults_are_those_of_the_signature() -> None:
    assert call(command, "x y") == {
        "source": ["x", "y"], "out": None, "kind": "a", "thresholds": [0.5], "fast": False, "sure": True, "group": Group(),
    }  # fmt: skip


def test_lists_flags_and_groups_are_typed_as_words() -> None:
    found = call(
        command, "x --thresholds 1 0.25 --fast --no_sure --files p q --n_rows 7 --no_keep --out o --kind b"
    )
    assert found == {
        "source": ["x"], "out": "o", "kind": "b", "thresholds": [1.0, 0.25], "fast": True, "sure": False,
        "group": Group(files=["p", "q"], n_rows=7, keep=False),
    }  # fmt: skip
    assert [type(t) for t in found["thresholds"]] == [float, float]


def test_a_flag_takes_a_value_too_and_no_word_that_follows() -> None:
    assert call(command, "--fast x")["source"] == ["x"]
    assert call(command, "--fast x")["fast"] is True
    assert call(command, "x --sure=false")["sure"] is False
    assert call(command, "x --sure false")["sure"] is False
    assert call(command, "x --keep")["group"].keep is True


def test_a_positional_with_a_default_may_be_left_out() -> None:
    assert call(optional, "a") == {"name": "a", "file": None}
    assert call(optional, "a b") == {"name": "a", "file": "b"}


def test_dashes_and_short_options_are_put_into_the_one_spelling() -> None:
    words = ["-o", "a-b", "--n-rows=4-5", "--x.y-z", "-1", "--no-fast", "c-d"]
    assert normalized(words, {"fast"}) == [
        "--out",
        "a-b",
        "--n_rows=4-5",
        "--x.y_z",
        "-1",
        "--fast=false",
        "c-d",
    ]


def test_no_option_may_be_abbreviated() -> None:
    with pytest.raises(UsageError, match=r"^no option --n_row \(did you mean '--n_rows'\?\)$"):
        call(command, "x --n_row 4")


def test_what_the_function_raises_for_wrong_use_is_one_of_use_and_a_bug_is_not() -> None:
    def missing() -> None:
        raise FileNotFoundError("no file 'x'")

    def bug() -> None:
        raise KeyError("x")

    with pytest.raises(UsageError, match=r"^no file 'x'$"):
        run_function(missing, [], prog="aen it")
    with pytest.raises(KeyError):
        run_function(bug, [], prog="aen it")


def test_help_is_made_of_the_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert make_parser(command, "aen it").format_help() == (
        "usage: aen it SOURCE... [options]\n\n"
        "Do it. At length.\n\n"
        "  SOURCE...                           (required) What to read.\n\n"
        "[value]: default. A flag is --FLAG or --no_FLAG.\n"
        "  --out STR                           Where to.\n"
        "  --kind [a]                          Of which kind. One of a, b.\n"
        "  --thresholds FLOAT... [[0.5]]       Some numbers.\n"
        "  --fast                              Hurry.\n"
        "  --sure [true]                       Be certain.\n\n"
        "Options of a group.\n"
        "  --files STR...                      Some files.\n"
        "  --n_rows INT [3]                    How many rows.\n"
        "  --keep                              Keep it, or not, or as it was.\n"
    )
    assert make_parser(optional, "aen it").format_help().startswith("usage: aen it NAME [FILE]\n")
