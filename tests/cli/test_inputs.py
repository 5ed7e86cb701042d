"""Signatures repeat choices of the library, so that parsing them imports nothing: they must be the same."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

import docstring_parser
import pytest

from aen_lightning.cli.diagnose import Section
from aen_lightning.cli.hub import import_, push
from aen_lightning.cli.inputs import EvaluationInputs
from aen_lightning.cli.report import FeaturePages
from aen_lightning.cli.shards import convert
from aen_lightning.diagnostics.diagnose import SECTIONS
from aen_lightning.hub import AUTHORS_REPO
from aen_lightning.hub.checkpoint import KINDS
from aen_lightning.language_model.cut_model import DTYPES


def choices(source: Any, name: str) -> tuple[Any, ...]:
    hint = get_type_hints(source)[name]
    members = [m for m in get_args(hint) if m is not type(None)]
    return get_args(members[0]) or tuple(members)


def test_choices_are_those_of_the_library() -> None:
    assert get_args(Section) == SECTIONS
    assert choices(EvaluationInputs, "model_dtype") == tuple(DTYPES)
    assert choices(convert, "dtype") == tuple(DTYPES)
    assert choices(import_, "kind") == KINDS
    assert f"hf://{AUTHORS_REPO}/" in (import_.__doc__ or "")
    assert choices(push, "architecture") == ("standard", "aen")


@pytest.mark.parametrize("cls", [EvaluationInputs, FeaturePages])
def test_every_field_is_documented(cls: type) -> None:
    documented = [p.arg_name for p in docstring_parser.parse(cls.__doc__ or "").params]
    assert documented == [f.name for f in dataclasses.fields(cls)]
