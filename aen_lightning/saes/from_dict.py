"""Turns a plain dict from YAML or Python into a checked SAELens training config.

SAELens drops keys it does not know, so that a misspelt coefficient trains on the default; here it is an
error.
"""

from __future__ import annotations

import copy
import dataclasses
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sae_lens import TrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from aen_lightning.saes.aen_config import AENTrainingSAEConfig
from aen_lightning.saes.lengths import is_share
from aen_lightning.spelling import suggest

_PAPER_KEYS = ("lambda_1", "lambda_2")


def build_sae_config(sae: dict[str, Any]) -> TrainingSAEConfig:
    """The SAELens training config that a dict describes.

    Args:
        sae: ``architecture`` (any that SAELens has registered, ``aen`` by default) and the fields of that
            architecture's training config. For ``aen`` the paper's ``lambda_1`` and ``lambda_2`` may stand
            instead of the coefficients.

    Raises:
        TypeError: If ``sae`` is not a dict.
        ValueError: For an unknown architecture, an unknown, missing or contradictory key, a value of the
            wrong type or out of range.
    """
    if not isinstance(sae, dict):
        raise TypeError(
            f"sae must be a dict such as {{'architecture': 'aen', 'd_in': 512, 'd_sae': 4096}}, "
            f"got {type(sae).__name__}"
        )
    fields = copy.deepcopy(sae)
    architecture = fields.pop("architecture", "aen")
    cfg_class = config_class(architecture)
    known = {field.name: field for field in dataclasses.fields(cfg_class) if field.init}
    is_aen = issubclass(cfg_class, AENTrainingSAEConfig)
    allowed = [*known, *(_PAPER_KEYS if is_aen else ())]
    unknown = [key for key in fields if key not in allowed]
    if unknown:
        near = suggest(unknown[0], allowed) or f"; it takes {', '.join(sorted(allowed))}"
        raise ValueError(f"sae has no key {unknown[0]!r} for architecture {architecture!r}{near}")
    missing = [
        name
        for name, field in known.items()
        if name not in fields
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"sae lacks {', '.join(missing)} (architecture {architecture!r})")
    hints = get_type_hints(cfg_class) | dict.fromkeys(_PAPER_KEYS, float)
    for key, value in fields.items():
        if key.endswith("_steps") and is_share(value):
            continue  # a length, also SAELens's own: TrackedSAE makes steps of it
        if not _fits(value, hints[key]):
            raise ValueError(f"sae.{key} must be {_type_name(hints[key])}, got {value!r}")
    k = fields.get("k", known["k"].default if "k" in known else 0)
    if k > fields["d_sae"]:
        raise ValueError(
            f"sae.k must be at most d_sae={fields['d_sae']}, got {k} (architecture {architecture!r})"
        )
    if is_aen:
        _convert_paper_lambdas(fields)
    return cfg_class.from_dict({**fields, "architecture": architecture})


def config_class(architecture: str) -> type[TrainingSAEConfig]:
    """The training config of an architecture.

    Raises:
        ValueError: If SAELens can train none of that name.
    """
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        near = suggest(architecture, SAE_TRAINING_CLASS_REGISTRY)
        known = ", ".join(sorted(SAE_TRAINING_CLASS_REGISTRY))
        raise ValueError(f"unknown SAE architecture {architecture!r}{near}; SAELens can train {known}")
    return SAE_TRAINING_CLASS_REGISTRY[architecture][1]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type; types of SAELens's own are left to their constructors."""
    members, origin = get_args(hint), get_origin(hint)
    if origin is Literal:
        return value in members
    if origin in (Union, UnionType):
        return any(_fits(value, member) for member in members)
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(element, members[0]) for element in value)
    if hint in (int, float):  # a whole number is a float, too; True is no number
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool, NoneType) else True


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _convert_paper_lambdas(fields: dict[str, Any]) -> None:
    for paper, ours in zip(_PAPER_KEYS, ("l1_coefficient", "l2_coefficient"), strict=True):
        if paper not in fields:
            continue
        if ours in fields:
            raise ValueError(
                f"sae has both {paper}={fields[paper]!r} and {ours}={fields[ours]!r}, which say the same "
                f"({ours} = d_in * {paper}): drop one"
            )
        fields[ours] = fields["d_in"] * fields.pop(paper)
