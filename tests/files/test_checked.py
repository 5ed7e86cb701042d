"""A file that is not what it should be is told in one line: file, field, expected, found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from aen_lightning.files.checked import (
    OUR_RECORD,
    Count,
    FileName,
    Foreign,
    Ours,
    Share,
    Size,
    Text,
    check,
    read_checked,
    read_yaml,
)


class Part(Ours):
    file: FileName
    n: Count = 0


class Whole(Ours):
    size: Size
    share: Share = 0.5
    names: str | list[str] | None = None
    parts: list[Part] = Field(default_factory=list)


class Other(Foreign):
    version: str | None = None


@dataclass
class Record:
    __pydantic_config__ = OUR_RECORD
    index: Annotated[int, Field(ge=0, strict=True)]
    file: FileName = "a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "size is missing"),
        ({"size": "3"}, "size: expected a valid integer, got '3'"),
        ({"size": True}, "size: expected a valid integer, got True"),
        ({"size": 3.0}, "size: expected a valid integer, got 3.0"),
        ({"size": 0}, "size: expected greater than or equal to 1, got 0"),
        ({"size": 2**40}, "size: expected less than or equal to 2147483648, got 1099511627776"),
        ({"size": 1, "share": float("nan")}, "share: expected a finite number, got nan"),
        ({"size": 1, "share": False}, "share: expected a valid number, got False"),
        ({"size": 1, "shar": 1}, "there is no key 'shar' (did you mean 'share'?)"),
        ({"size": 1, "names": 3}, "names: expected a valid string, got 3 (and 1 more)"),
        ({"size": 1, "parts": [{"file": "a"}, {"file": "../b"}]},
         "parts[1].file: expected the name of a file in this folder, without any path, got '../b'"),
        ({"size": 1, "parts": [{}]}, "parts[0].file is missing"),
        ({"size": 1, "parts": {"a": 1}}, "parts: expected a valid list, got a mapping of 1"),
        ([], "expected a valid dictionary or instance of Whole, got a list of 0"),
    ],
)  # fmt: skip
def test_the_line_says_file_field_expected_and_found(content: Any, message: str):
    with pytest.raises(ValueError, match=r"^f\.json: ") as caught:
        check(Whole, content, "f.json")
    assert str(caught.value) == f"f.json: {message}"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/a", "a/b", "..\\a", "C:a", "a\0", "a\x1b[2J", "a" * 300, "a\n"]
)
def test_a_file_name_is_no_path(name: str):
    with pytest.raises(ValueError, match=r"^f: file: "):
        check(Part, {"file": name}, "f")


def test_foreign_keys_stay_and_known_ones_are_checked():
    assert check(Other, {"version": "1", "more": [1]}, "f").model_extra == {"more": [1]}
    with pytest.raises(ValueError, match=r"^f: version: expected a valid string, got 3$"):
        check(Other, {"version": 3}, "f")


def test_a_dataclass_is_a_form_too():
    assert check(Record, {"index": 1}, "f") == Record(1, "a")
    for content, message in (
        ({"index": -1}, "index: expected"),
        ({"index": 1, "x": 1}, "there is no key 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            check(Record, content, "f")


def test_what_a_terminal_would_obey_is_spelt_out():
    with pytest.raises(ValueError, match="there is no key") as caught:
        check(Whole, {"size": 1, "\x1b[2J": 1}, "f")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "holds a list, expected a JSON object"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 30 + b"}", "needs more than 64 bits"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_what_is_no_json_object_of_ours_is_named(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "f.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_checked(path, Text)
    assert str(caught.value).startswith(str(path))


def test_a_whole_surrogate_pair_is_text(tmp_path: Path):
    (tmp_path / "f.json").write_text(json.dumps({"version": "😀"}))
    assert read_checked(tmp_path / "f.json", Other).version == "😀"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "holds a list, expected a mapping"),
        ("a: [", "no YAML of plain data"),
        ("a: !!python/object/apply:os.getcwd []", "no YAML of plain data"),
        ("a: &a [*a]", "refers to itself"),
        ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{n}: &{n} [{','.join([f'*{p}'] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)),
         "refers to itself"),
        ("[" * 5000, "no YAML of plain data"),
    ],
)  # fmt: skip
def test_yaml_is_plain_data_of_a_size(tmp_path: Path, text: str, message: str):
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
