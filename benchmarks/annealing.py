"""A falling k, which gives BatchTopK a start that is less sparse than its end: its own answer to our penalised start."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


class AnnealK(pl.Callback):
    """Lets the ``k`` of SAELens's BatchTopK SAEs fall linearly, then stay.

    A function of the optimizer step alone, so a resumed run needs nothing saved. The threshold that is exported is an average of
    the last hundreds of steps, all of them at the last ``k``.

    Args:
        start: ``k`` of the first step.
        end: ``k`` from step ``steps`` on.
        steps: Optimizer steps over which it falls.
    """

    def __init__(self, start: float, end: float, steps: int) -> None:
        self.start, self.end, self.steps = start, end, steps

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Set the ``k`` of this step."""
        left = max(0.0, 1 - trainer.global_step / self.steps)
        for tracked in pl_module.tracked:  # type: ignore[union-attr]
            tracked.sae.activation_fn.k = self.end + left * (self.start - self.end)
