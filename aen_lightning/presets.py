"""Presets: settings that work without a search, each as one table.

``paper`` is arXiv:2605.05341, to the constant. ``recommended`` is the winner by the evidence in
``docs/experiments.md``. Their numbers are here and nowhere else, but for what a recipe adds for its own run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import lightning.pytorch as pl

from aen_lightning.callbacks import HardFinish, InitializeFromData, ReviveSilent, TargetL0
from aen_lightning.spelling import suggest
from aen_lightning.training.module import SAEModule

PresetName = Literal["paper", "recommended"]
PRESET_NAMES: tuple[str, ...] = get_args(PresetName)
DEFAULT_L0 = 32


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


def preset(name: str, *, architecture: str = "aen", l0: float = DEFAULT_L0) -> Preset:
    """A preset for an architecture.

    Args:
        name: ``paper`` or ``recommended``.
        architecture: The SAE's.
        l0: Mean active features per token that ``recommended`` steers to, a count.

    Raises:
        ValueError: If there is no such preset, or it does not fit the architecture.
    """
    if name not in PRESET_NAMES:
        near = suggest(name, PRESET_NAMES) or f"; there are {', '.join(PRESET_NAMES)}"
        raise ValueError(f"unknown preset {name!r}{near}")
    fitting = _RECOMMENDED if name == "recommended" else _PAPER
    if architecture not in fitting:
        raise ValueError(
            f"preset {name!r} is for architecture {' or '.join(fitting)}, not for {architecture!r}: "
            "use preset null, or another architecture"
        )
    return fitting[architecture](l0)


def _recommended_aen(l0: float) -> Preset:
    return Preset(
        sae={
            "lambda_1": 5e-4,  # where TargetL0 starts from
            "lambda_2": 0.0,
            "gamma": 0.0,
            "ema_decay": 0.99,
            "starvation_guard": 0.1,
            "remove_radial_gradient": True,
            "decoder_init_norm": 1.0,  # tied to the encoder
            "warmup_delay_steps": 0,
            # of the hard phase, in which wide dictionaries would lose one or two features in a hundred; 1 drives many silent
            # features into one residual at once, and the run's explained variance falls by a third
            "aux_loss_coefficient": 0.03,
            "aux_loss_window": 0.03,
        },
        training={"lr": 3e-3, "lr_decay_steps": 0.2},
        callbacks={
            InitializeFromData: {"b_dec": "mean", "l0": "target"},
            # a penalty that holds l0 itself would starve features that the hard phase can use
            TargetL0: {"l0": l0, "reach_at": 0.15, "headroom": 2.0},
            HardFinish: {"k": l0, "at": 0.4},
        },
    )


def _recommended_gated(l0: float) -> Preset:
    """Differentiable throughout but for the gate's switch: no hard phase."""
    base = _recommended_aen(l0)
    sae = {key: value for key, value in base.sae.items() if not key.startswith("aux_loss")}
    callbacks = {cls: arguments for cls, arguments in base.callbacks.items() if cls is not HardFinish}
    callbacks[TargetL0] = {**callbacks[TargetL0], "headroom": 1.0}
    callbacks[ReviveSilent] = {"window": 0.03, "rate": 4.0}  # no hard phase, no auxiliary loss
    return Preset(sae, base.training, callbacks)


def _published_aen(l0: float) -> Preset:
    """Of Pythia-70M, in units that do not depend on its width."""
    return Preset(
        sae={
            "lambda_1": 1e-3,
            "lambda_2": 5e-4,
            "gamma": 0.5,
            "ema_decay": 0.9999,
            "reference_fraction": 0.05,
            "weight_min": 0.01,
            "weight_max": 10.0,
            "warmup_delay_steps": 4000,
            "warmup_ramp_steps": 2000,
        },
        training={"lr": 1e-3},
    )


_RECOMMENDED = {"aen": _recommended_aen, "aen_gated": _recommended_gated}
_PAPER = {"aen": _published_aen}


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

    Examples:
        >>> from aen_lightning.presets import recommended
        >>> module, callbacks = recommended(d_in=64, d_sae=256, l0=8, max_steps=1000)
        >>> [type(callback).__name__ for callback in callbacks]
        ['InitializeFromData', 'TargetL0', 'HardFinish']

    Args:
        d_in: Width of the activations, scaled so that their norm is about ``sqrt(d_in)``.
        d_sae: Number of features.
        l0: Mean active features per token to end with, a count.
        max_steps: Length of the run, in optimizer steps; the Trainer needs the same.
        architecture: ``aen``; ``aen_gated`` for one without a hard phase.
        sae: Fields of the SAE's config that win over the preset's.
        seed: As for :class:`~aen_lightning.SAEModule`.
        **training: Arguments of :class:`~aen_lightning.SAEModule` that win over the preset's.

    Raises:
        ValueError: For an architecture that the preset does not fit, or a value out of range.
    """
    chosen = preset("recommended", architecture=architecture, l0=l0)
    fields = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        **with_preset(sae or {}, chosen.sae),
    }
    module = SAEModule(fields, seed=seed, **{**chosen.training, **training})
    return Recommended(module, [make(**kwargs) for make, kwargs in chosen.callbacks.items()])


_SAME = {"lambda_1": "l1_coefficient", "lambda_2": "l2_coefficient"}  # in other units


def with_preset(given: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The given fields of an SAE, and those of ``fields`` that they do not speak of."""
    spoken_of = {*given, *(_SAME[key] for key in given if key in _SAME)}
    spoken_of |= {key for key, same in _SAME.items() if same in given}
    return {**given, **{key: value for key, value in fields.items() if key not in spoken_of}}
