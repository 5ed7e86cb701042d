"""What other commands wrote about dictionaries, read as anybody's file: typed, bounded, named where it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from aen_lightning.files import read_json
from aen_lightning.files.checked import Count, Flag, Foreign, Number, Ours, Share, Size, Text, Word, check

_Section = dict[Word, Any] | None


class _About(Foreign):
    path: Text


class _Features(Foreign):
    dead_pct: Number | None
    n_tokens: Count | None = None


class _Result(Foreign):
    """The head of every result, with what a later version may have added."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    created: Text | None = None
    versions: dict[Word, Text | None] | None = None
    dictionary: _About | None = None


class _Evaluation(_Result):
    """``evaluation.json``; of its sections the tables read numbers and estimates, and check them."""

    command: Literal["evaluate"]
    features: _Features
    sparsity: _Section = None
    reconstruction: _Section = None
    downstream: _Section = None
    ground_truth: _Section = None


class _Composition(Foreign):
    sizes: list[Size]
    lost_share: list[Number | None]
    spurious: list[Number | None]

    @model_validator(mode="after")
    def _equally_long(self) -> Self:
        if not len(self.sizes) == len(self.lost_share) == len(self.spurious):
            raise ValueError("expected sizes, lost_share and spurious of one length")
        return self


class _Diagnosis(_Result):
    """``diagnosis.json``, likewise."""

    command: Literal["diagnose"]
    coherence: _Section = None
    active_gram: _Section = None
    lipschitz: _Section = None
    coding_gap: _Section = None
    composition: _Composition | None = None


class _Cosine(Ours):
    mean: Number | None
    min: Number | None = None
    p10: Number | None = None
    p50: Number | None = None
    p90: Number | None = None
    max: Number | None = None


class _Shares(Ours):
    of_a: Share
    of_b: Share


class _Pair(Ours):
    a: Word
    b: Word
    cosine: _Cosine
    found_again: dict[Word, _Shares]
    exact: Flag = True
    n_pairs: Count = 0
    unstable: dict[Word, Any] | None = None


class _Chance(Ours):
    cosine: _Cosine
    found_again: dict[Word, Share]


class _Comparison(Ours):
    """``aen compare --out``."""

    command: Literal["compare"]
    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    created: Text | None = None
    versions: dict[Word, Text | None] | None = None
    dictionaries: dict[Word, dict[Word, Any]] | None = None
    n_features: dict[Word, Size]
    n_compared: dict[Word, Count]
    dead_features_left_out: Flag = False
    pairs: list[_Pair]
    found_in_all: dict[Word, dict[Word, Share]] | None = None
    random_baseline: dict[Word, _Chance] | None = None

    @model_validator(mode="after")
    def _of_one_set_of_dictionaries(self) -> Self:
        names, thresholds = set(self.n_features), set(self.pairs[0].found_again) if self.pairs else set()
        if set(self.n_compared) != names:
            raise ValueError("expected n_compared to name the dictionaries of n_features")
        for pair in self.pairs:
            if not {pair.a, pair.b} <= names:
                raise ValueError(f"expected pairs of the dictionaries of n_features, not {pair.a[:60]!r}")
        found: list[_Pair | _Chance] = [*self.pairs, *(self.random_baseline or {}).values()]
        if any(set(entry.found_again) != thresholds for entry in found):
            raise ValueError("expected the same thresholds under found_again everywhere")
        return self


_FORMS: dict[str, Any] = {"evaluate": _Evaluation, "diagnose": _Diagnosis, "compare": _Comparison}


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a JSON that a command of this package wrote.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is none; names the field that is wrong.
    """
    content = read_json(path)
    command = content.get("command")
    form = _FORMS.get(command) if isinstance(command, str) else None
    if form is None:
        raise ValueError(
            f"{path} is no result of aen {', aen '.join(_FORMS)}: its 'command' is {str(command)[:60]!r}"
        )
    check(form, content, path)
    return content
