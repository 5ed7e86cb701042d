"""Presets: settings that work without a search, each as one table.

``paper`` is arXiv:2605.05341, to the constant, and needs no door of its own: it is what the configs default to.
``recommended`` is the winner by the evidence in ``docs/experiments.md``. Its numbers are here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import lightning.pytorch as pl

from aen_lightning.callbacks import HardFinish, InitializeFromData, TargetL0
from aen_lightning.spelling import suggest
from aen_lightning.training.module import SAEModule

PresetName = Literal["paper", "recommended"]


@dataclass(frozen=True)
class Preset:
    """What a preset sets.

    Args:
        sae: Fields of the SAE's config.
        training: Arguments of the module that trains it.
        callbacks: Callback classes and their arguments.
    """

    sae: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[type[pl.Callback], dict[str, Any]] = field(default_factory=dict)


def preset(name: str, *, architecture: str = "aen", l0: float = 32) -> Preset:
    """A preset for an architecture.

    Args:
        name: ``paper`` or ``recommended``.
        architecture: The SAE's.
        l0: Mean active features per token that ``recommended`` steers to, a count.

    Raises:
        ValueError: If there is no such preset, or it does not fit the architecture.
    """
    if name not in get_args(PresetName):
        near = suggest(name, get_args(PresetName)) or f"; there are {', '.join(get_args(PresetName))}"
        raise ValueError(f"unknown preset {name!r}{near}")
    fitting = _RECOMMENDED if name == "recommended" else _PAPER
    if architecture not in fitting:
        raise ValueError(
            f"preset {name!r} is for architecture {' or '.join(fitting)}, not for {architecture!r}: "
            "remove the preset, or change the architecture"
        )
    return fitting[architecture](l0)


def _recommended_aen(l0: float) -> Preset:
    return Preset(
        sae={
            "lambda_1": 2e-3,  # where TargetL0 starts from
            "lambda_2": 0.0,
            "gamma": 0.0,
            "ema_decay": 0.99,
            "starvation_guard": 0.1,
            "remove_radial_gradient": True,
            "decoder_init_norm": 1.0,  # tied to the encoder
            "warmup_delay_steps": 0,
        },
        training={"lr": 3e-3, "lr_decay_steps": 0.2},
        callbacks={
            InitializeFromData: {"b_dec": "mean", "active_share": 0.05},
            TargetL0: {"l0": l0},
            HardFinish: {"k": l0, "at": 0.4},
        },
    )


_RECOMMENDED = {"aen": _recommended_aen}
_PAPER = {"aen": lambda l0: Preset()}  # the defaults of the config are the published constants


class Recommended(NamedTuple):
    """What to train, and with which callbacks."""

    module: SAEModule
    callbacks: list[pl.Callback]


def recommended(
    *,
    d_in: int,
    d_sae: int,
    l0: float,
    max_steps: int,
    architecture: str = "aen",
    sae: dict[str, Any] | None = None,
    seed: int | None = None,
    **training: Any,
) -> Recommended:
    """The recommended SAE, ready for ``Trainer(max_steps=..., callbacks=callbacks).fit(module, data)``.

    >>> from aen_lightning.presets import recommended
    >>> module, callbacks = recommended(d_in=64, d_sae=256, l0=8, max_steps=1000)
    >>> [type(callback).__name__ for callback in callbacks]
    ['InitializeFromData', 'TargetL0', 'HardFinish']

    Args:
        d_in: Width of the activations, scaled so that their norm is about ``sqrt(d_in)``.
        d_sae: Number of features.
        l0: Mean active features per token to end with, a count.
        max_steps: Length of the run, in optimizer steps; the Trainer needs the same.
        architecture: ``aen``.
        sae: Fields of the SAE's config that win over the preset's.
        seed: As for :class:`~aen_lightning.SAEModule`.
        **training: Arguments of :class:`~aen_lightning.SAEModule` that win over the preset's.

    Raises:
        ValueError: For an architecture that the preset does not fit, or a value out of range.
    """
    chosen = preset("recommended", architecture=architecture, l0=l0)
    given = dict(sae or {})
    fields = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, **without_rivals(chosen.sae, given)}
    module = SAEModule({**fields, **given}, seed=seed, **{**chosen.training, **training})
    return Recommended(module, [make(**kwargs) for make, kwargs in chosen.callbacks.items()])


_RIVALS = {"lambda_1": "l1_coefficient", "lambda_2": "l2_coefficient"}


def without_rivals(fields: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The preset's fields of an SAE, less those that say the same as a given one in other units."""
    return {key: value for key, value in fields.items() if _RIVALS.get(key) not in given}
