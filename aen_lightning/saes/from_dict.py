"""Turns a plain dict from YAML or Python into a checked SAELens training config.

SAELens drops keys it does not know, so that a misspelt coefficient trains on the default; here it is an error.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from sae_lens import TrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from aen_lightning.saes.aen_config import AENTrainingSAEConfig
from aen_lightning.spelling import suggest

_PAPER_KEYS = ("lambda_1", "lambda_2")


def build_sae_config(sae: dict[str, Any]) -> TrainingSAEConfig:
    """The SAELens training config that a dict describes.

    Args:
        sae: ``architecture`` (any that SAELens has registered, ``aen`` by default) and the fields of that architecture's
            training config. For ``aen`` the paper's ``lambda_1`` and ``lambda_2`` may stand instead of the coefficients.

    Raises:
        TypeError: If ``sae`` is not a dict.
        ValueError: For an unknown architecture, an unknown, missing or contradictory key, or a value out of range.
    """
    if not isinstance(sae, dict):
        raise TypeError(
            f"sae must be a dict such as {{'architecture': 'aen', 'd_in': 512, 'd_sae': 4096}}, got {type(sae).__name__}"
        )
    fields = copy.deepcopy(sae)
    architecture = fields.pop("architecture", "aen")
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(
            f"unknown SAE architecture {architecture!r}{suggest(architecture, SAE_TRAINING_CLASS_REGISTRY)}; "
            f"SAELens can train {', '.join(sorted(SAE_TRAINING_CLASS_REGISTRY))}"
        )
    cfg_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    known = {field.name: field for field in dataclasses.fields(cfg_class) if field.init}
    is_aen = issubclass(cfg_class, AENTrainingSAEConfig)
    allowed = [*known, *(_PAPER_KEYS if is_aen else ())]
    unknown = [key for key in fields if key not in allowed]
    if unknown:
        raise ValueError(
            f"sae has no key {unknown[0]!r} for architecture {architecture!r}{suggest(unknown[0], allowed)}; "
            f"it takes {', '.join(sorted(allowed))}"
        )
    missing = [
        name
        for name, field in known.items()
        if name not in fields and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"sae lacks {', '.join(missing)} (architecture {architecture!r})")
    if is_aen:
        _convert_paper_lambdas(fields)
    return cfg_class.from_dict({**fields, "architecture": architecture})


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
