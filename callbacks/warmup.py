"""Delayed warm-up of the adaptive weights."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from aen_lightning.callbacks.modules import adaptive_saes
from aen_lightning.saes.lengths import Length, check_length, in_steps
from aen_lightning.saes.penalty import warmup_ramp


class DelayedWarmup(pl.Callback):
    """Holds the adaptive weights at 1 for a while, then lets them in linearly (arXiv:2605.05341, section 4).

    A function of the optimizer step alone, so a resumed run needs nothing saved. This is a warm-up of the
    *weights*; the L1 term as a whole is warmed up by the SAE's ``l1_warmup_steps``.

    Args:
        delay_steps: Optimizer steps with all weights 1, or a share of the run. None: the SAE's
            ``warmup_delay_steps``.
        ramp_steps: Optimizer steps, or a share, of the rise. None: the SAE's ``warmup_ramp_steps``.
    """

    def __init__(self, delay_steps: Length | None = None, ramp_steps: Length | None = None) -> None:
        if delay_steps is not None:
            check_length(delay_steps, "DelayedWarmup.delay_steps", at_least=None)
        if ramp_steps is not None:
            check_length(ramp_steps, "DelayedWarmup.ramp_steps")
        self.delay_steps = delay_steps
        self.ramp_steps = ramp_steps
        self._ramps: list[float] | None = None  # what the SAEs have, once it is known

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module without adaptive weights before any work."""
        adaptive_saes(pl_module, self)
        self._ramps = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the ramp for the step that begins."""
        run_steps, saes, ramps = trainer.estimated_stepping_batches, adaptive_saes(pl_module, self), []
        for sae in saes:
            delay = sae.cfg.warmup_delay_steps if self.delay_steps is None else self.delay_steps
            rise = sae.cfg.warmup_ramp_steps if self.ramp_steps is None else self.ramp_steps
            ramp = warmup_ramp(
                trainer.global_step + 1,
                delay_steps=in_steps(delay, run_steps, "warmup_delay_steps"),
                ramp_steps=in_steps(rise, run_steps, "warmup_ramp_steps"),
            )
            ramps.append(ramp)
        if ramps != self._ramps:
            for sae, ramp in zip(saes, ramps, strict=True):
                sae.set_ramp(ramp)
            self._ramps = ramps
