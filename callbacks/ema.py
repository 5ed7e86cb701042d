"""Refresh of the adaptive weights from the running means."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from aen_lightning.callbacks.modules import adaptive_saes, step_schedule


class EMAWeightRefresh(pl.Callback):
    """Recomputes the adaptive L1 weights from the running mean activations every n optimizer steps.

    The running means themselves move at every step; only the weights derived from them wait. This has nothing
    to do with averaging model weights (Lightning's ``EMAWeightAveraging``).

    Args:
        every_n_steps: Optimizer steps between refreshes, the first step included. 1 is the paper.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise ValueError(f"EMAWeightRefresh.every_n_steps must be >= 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module without adaptive weights before any work."""
        adaptive_saes(pl_module, self)
        step_schedule(pl_module, self)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Say whether the step that begins refreshes the weights."""
        step_schedule(pl_module, self).refresh_weights = trainer.global_step % self.every_n_steps == 0
