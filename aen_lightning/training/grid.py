"""Expands lists in a sweep's config into its members."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY


@dataclasses.dataclass(frozen=True)
class Member:
    """One SAE of a sweep: a name made of what varies, its SAE dict, its seed, and the varied values."""

    name: str
    sae: dict[str, Any]
    seed: int
    varied: dict[str, Any]


def expand_grid(sae: dict[str, Any] | list[dict[str, Any]], seed: int | list[int]) -> list[Member]:
    """Every combination of the listed values, in the order written; several dicts give their grids one after
    the other.

    A field that is a list by nature (``matryoshka_widths``) varies only as a list of lists.

    Raises:
        ValueError: If the grid has no member, or one twice.
    """
    blocks = sae if isinstance(sae, list) else [sae]
    seeds = seed if isinstance(seed, list) else [seed]
    combinations: list[tuple[dict[str, Any], int]] = []
    for block in blocks:
        axes = [(key, _values(block, key, value)) for key, value in block.items()]
        for values in itertools.product(*(values for _, values in axes)):
            fields = dict(zip((key for key, _ in axes), values, strict=True))
            combinations += [(fields, one_seed) for one_seed in seeds]
    if not combinations:
        raise ValueError(
            "the sweep has no member: give sae at least one dict, and every list at least one value"
        )
    keys = list(dict.fromkeys(key for fields, _ in combinations for key in fields))
    differing = [key for key in keys if len({_value_of(fields, key) for fields, _ in combinations}) > 1]
    listed = [key for key in differing if any(len(_values(b, key, b[key])) > 1 for b in blocks if key in b)]
    naming = _naming_keys([fields for fields, _ in combinations], differing, listed)
    members = []
    for fields, one_seed in combinations:
        varied = {key: fields[key] for key in differing if key in fields}
        named = {key: fields[key] for key in naming if key in fields}
        if len(seeds) > 1:
            varied["seed"] = named["seed"] = one_seed
        members.append(Member(_name(named) or "sae", fields, one_seed, varied))
    names = [member.name for member in members]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the sweep has {twice[0]!r} more than once: remove repeated values")
    return members


def _naming_keys(members: list[dict[str, Any]], differing: list[str], listed: list[str]) -> list[str]:
    """The architecture and the axes of the grid, and as many more of the differing fields as tell all members
    apart.
    """
    chosen = [key for key in differing if key == "architecture" or key in listed]

    def n_apart(keys: list[str]) -> int:
        return len({tuple(_value_of(fields, key) for key in keys) for fields in members})

    for key in differing:
        if n_apart(chosen) == n_apart(differing):
            break
        if n_apart([*chosen, key]) > n_apart(chosen):
            chosen.append(key)
    return chosen


def _value_of(fields: dict[str, Any], key: str) -> str:
    return repr(fields.get(key, _ABSENT))


_ABSENT = object()


def _values(block: dict[str, Any], key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    if _is_list_field(block.get("architecture", "aen"), key):
        return value if value and all(isinstance(v, list) for v in value) else [value]
    return value


def _is_list_field(architecture: Any, key: str) -> bool:
    names = architecture if isinstance(architecture, list) else [architecture]
    for name in names:
        if name in SAE_TRAINING_CLASS_REGISTRY:
            for field in dataclasses.fields(SAE_TRAINING_CLASS_REGISTRY[name][1]):
                if field.name == key and "list" in str(field.type):
                    return True
    return False


def _name(varied: dict[str, Any]) -> str:
    """A name that is safe as a folder and a log prefix: ``aen-lambda_1=0.005-seed=0``."""
    parts = [str(value) if key == "architecture" else f"{key}={value}" for key, value in varied.items()]
    return re.sub(r"[^A-Za-z0-9_.=+-]+", "_", "-".join(parts))
