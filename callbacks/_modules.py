"""What callbacks may know of the module they are attached to: its ``sae``."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from sae_lens import TrainingSAE

from aen_lightning.sae import AENTrainingSAE


def training_sae(pl_module: pl.LightningModule, callback: pl.Callback) -> TrainingSAE[Any]:
    """The SAE that ``pl_module`` trains.

    Raises:
        TypeError: If it has none.
    """
    sae = getattr(pl_module, "sae", None)
    if not isinstance(sae, TrainingSAE):
        raise TypeError(
            f"{type(callback).__name__} needs a module with a SAELens training SAE as `sae`, got {type(pl_module).__name__}"
        )
    return sae


def adaptive_sae(pl_module: pl.LightningModule, callback: pl.Callback) -> AENTrainingSAE:
    """The AEN-SAE that ``pl_module`` trains.

    Raises:
        TypeError: If it trains something without adaptive weights.
    """
    sae = training_sae(pl_module, callback)
    if not isinstance(sae, AENTrainingSAE):
        raise TypeError(
            f"{type(callback).__name__} schedules adaptive weights, which architecture {sae.cfg.architecture()!r} "
            "does not have: remove the callback, or train architecture 'aen'"
        )
    return sae
