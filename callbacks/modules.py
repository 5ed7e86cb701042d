"""What callbacks may know of the module they are attached to: its ``saes``, by name."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from sae_lens import TrainingSAE
from torch import Tensor, nn

from aen_lightning.saes.aen import AENTrainingSAE
from aen_lightning.saes.step_schedule import StepSchedule


def training_saes(pl_module: pl.LightningModule, callback: pl.Callback) -> dict[str, TrainingSAE[Any]]:
    """The SAEs that ``pl_module`` trains, by name; the only one of a run has the empty name.

    Raises:
        TypeError: If it has none.
    """
    saes = getattr(pl_module, "saes", None)
    if not isinstance(saes, dict) or not all(isinstance(sae, TrainingSAE) for sae in saes.values()):
        raise TypeError(
            f"{type(callback).__name__} needs a module with SAELens training SAEs as `saes`, got "
            f"{type(pl_module).__name__}"
        )
    return saes


def adaptive_saes(pl_module: pl.LightningModule, callback: pl.Callback) -> list[AENTrainingSAE]:
    """The AEN-SAEs that ``pl_module`` trains; none once it has come to its refit.

    Raises:
        TypeError: If none of its SAEs has adaptive weights.
    """
    saes = training_saes(pl_module, callback)
    adaptive = [sae for sae in saes.values() if isinstance(sae, AENTrainingSAE)]
    if not adaptive and not in_refit(pl_module):
        names = ", ".join(sorted({repr(sae.cfg.architecture()) for sae in saes.values()}))
        raise TypeError(
            f"{type(callback).__name__} schedules adaptive weights, which architecture {names} "
            "does not have: remove the callback, or train architecture 'aen'"
        )
    return adaptive


def in_refit(pl_module: pl.LightningModule) -> bool:
    """Whether ``pl_module`` trains the refit of its SAEs."""
    return bool(getattr(pl_module, "in_refit", False))


def step_schedule(pl_module: pl.LightningModule, callback: pl.Callback) -> StepSchedule:
    """The schedule that ``pl_module`` hands to its SAEs with the next batch; a callback may change it before.

    Raises:
        TypeError: If it has none.
    """
    schedule = getattr(pl_module, "step_schedule", None)
    if not isinstance(schedule, StepSchedule):
        raise TypeError(
            f"{type(callback).__name__} needs a module with a StepSchedule as `step_schedule`, got "
            f"{type(pl_module).__name__}"
        )
    return schedule


def sparsity_multipliers(pl_module: pl.LightningModule, callback: pl.Callback) -> dict[str, Tensor]:
    """The scalars by which ``pl_module`` multiplies the sparsity coefficient of each of its SAEs; a callback
    may fill them.

    Raises:
        TypeError: If it has none.
    """
    multipliers = getattr(pl_module, "sparsity_multipliers", None)
    if not isinstance(multipliers, dict):
        raise TypeError(
            f"{type(callback).__name__} needs a module with scalars by name as `sparsity_multipliers`, "
            f"got {type(pl_module).__name__}"
        )
    return multipliers


def encoder_biases(sae: TrainingSAE[Any]) -> list[nn.Parameter]:
    """``b_enc``, or the biases of a gated SAE's two heads, which start equal, each (d_sae,); none if it has none."""
    found = [getattr(sae, name, None) for name in ("b_enc", "b_gate", "b_mag")]
    return [bias for bias in found if isinstance(bias, nn.Parameter)]


def silent_steps(pl_module: pl.LightningModule, callback: pl.Callback) -> dict[str, Tensor]:
    """For how many training steps each feature of each SAE of ``pl_module`` has not fired, by name, (d_sae,), int64.

    Raises:
        TypeError: If it does not count them.
    """
    silent = getattr(pl_module, "silent_steps", None)
    if not isinstance(silent, dict):
        raise TypeError(
            f"{type(callback).__name__} needs a module with counts by name as `silent_steps`, got "
            f"{type(pl_module).__name__}"
        )
    return silent


def prefixed(name: str, key: str) -> str:
    """``name/key``, or ``key`` for the only SAE of a run."""
    return f"{name}/{key}" if name else key
