"""Files of strangers, read as what they should be: every field typed, bounded, and named where it is wrong.

A format is a pydantic model (or a dataclass) made of the types here; :func:`read_checked` and :func:`check`
give it, or one line that says which field of which file is what instead of what.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from aen_lightning.files import MAX_TEXT_BYTES, human_size, read_json
from aen_lightning.spelling import printable, suggest

T = TypeVar("T")

OURS = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
"""Of a format of our own: a key that it has not is an error."""
OUR_RECORD = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
"""``__pydantic_config__`` of a dataclass of ours: strict by the types of its fields, as pydantic would want an
instance where it is strict with a dataclass itself."""
FOREIGN = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
"""Of a format of others, which may have keys that we do not know."""

_MAX_YAML_NODES = 200_000


class Ours(BaseModel):
    """Base of our own formats."""

    model_config = OURS


class Foreign(BaseModel):
    """Base of what we read of the formats of others; unknown keys stay, unchecked."""

    model_config = FOREIGN


def _file_name(value: str) -> str:
    pure = {value} == {PurePosixPath(value).name, PureWindowsPath(value).name}
    if not pure or value in (".", "..") or not value.isprintable():
        raise ValueError("expected the name of a file in this folder, without any path")
    return value


FileName = Annotated[str, Field(min_length=1, max_length=255, strict=True), AfterValidator(_file_name)]
"""A file in the folder at hand: no separator, no ``..``, nothing absolute."""
Text = Annotated[str, Field(max_length=100_000, strict=True)]
Word = Annotated[str, Field(min_length=1, max_length=1000, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(ge=0, le=2**50, strict=True)]
Size = Annotated[int, Field(ge=1, le=2**31, strict=True)]
Number = Annotated[float, Field(strict=True)]
"""A whole number or any other, finite; no flag."""
Share = Annotated[float, Field(ge=0, le=1, strict=True)]


def check(form: type[T], content: Any, where: str | Path) -> T:
    """``content`` as ``form``.

    Args:
        form: A pydantic model, a dataclass, or any type that pydantic knows.
        content: Plain data, as from JSON.
        where: What the message begins with: the file.

    Raises:
        ValueError: In one line: file, field, what was expected and what stands there.
    """
    try:
        return TypeAdapter(form).validate_python(content)
    except ValidationError as error:
        raise ValueError(f"{where}: {_explained(error, form, content)}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deeply") from error


def read_checked(path: str | Path, form: type[T]) -> T:
    """A JSON file as ``form``.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is no JSON object, or not of this form; one line that names file and field.
    """
    return check(form, read_json(path), path)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, such as a run's ``config.yaml``; plain data only, no tags of Python.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is none, or unfolds to more than it may by references to itself.
    """
    path = Path(path)
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        raise ValueError(f"{path} has {human_size(size)}, which no config has")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = " ".join(printable(str(error)).split())
        raise ValueError(f"{path} is no YAML of plain data: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a mapping")
    _require_few_nodes(content, path)
    return content


def _require_few_nodes(content: Any, path: Path) -> None:
    """A few lines of references can unfold to more than any memory, or to themselves."""
    waiting, seen = [content], 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if seen > _MAX_YAML_NODES:
            raise ValueError(f"{path} unfolds to more than {_MAX_YAML_NODES:,} values: it refers to itself")
        if isinstance(node, dict):
            waiting += [*node.keys(), *node.values()]
        elif isinstance(node, list | tuple | set):
            waiting += node


def _explained(error: ValidationError, form: Any, content: Any) -> str:
    first = error.errors(include_url=False, include_context=True)[0]
    more = error.error_count() - 1
    line = _line(first, form, content)
    return line + (f" (and {more} more)" if more else "")


def _line(error: ErrorDetails, form: Any, content: Any) -> str:
    found, place = _at(content, error["loc"], error["type"].startswith("missing"))
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"there is no key {place!r}{suggest(str(error['loc'][-1]), _keys(form, error['loc']))}"
    if error["type"].startswith("missing"):
        return f"{place} is missing"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = message if message.startswith("expected") else f"expected {message}"
    return f"{place}: {expected}, got {shortened(found)}" if place else f"{expected}, got {shortened(found)}"


def _at(content: Any, loc: tuple[int | str, ...], is_missing: bool) -> tuple[Any, str]:
    """What stands at a place, and the place as one writes it: ``shards[3].file``.

    pydantic's own also names the member of a union that did not fit, which is no part of the content.
    """
    place = ""
    for i, part in enumerate(loc):
        here = isinstance(content, dict) and part in content
        if here or (is_missing and i == len(loc) - 1):
            word = shortened(part) if str(part) != printable(str(part)) else str(part)[:100]
            place += f".{word}" if place else word
            content = content[part] if here else None
        elif isinstance(content, list | tuple) and isinstance(part, int) and part < len(content):
            place += f"[{part}]"
            content = content[part]
    return content, place


def _keys(form: Any, loc: tuple[int | str, ...]) -> list[str]:
    fields = getattr(form, "model_fields", None) or getattr(form, "__dataclass_fields__", {})
    return list(fields) if len(loc) == 1 else []


def shortened(value: Any) -> str:
    """A value as it stands in an error: its first 60 characters, nothing that a terminal would obey."""
    if isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = printable(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
