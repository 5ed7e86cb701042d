"""Raises the bias of features that have gone silent until they fire again."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from aen_lightning.callbacks.modules import encoder_biases, in_refit, silent_steps, training_saes
from aen_lightning.saes.lengths import Length, check_length, in_steps


class ReviveSilent(pl.Callback):
    """Before each optimizer step, adds ``rate`` times the learning rate to the bias of every silent feature.

    A penalised feature that no longer fires has no gradient, so nothing brings it back. With this its bias
    rises, as fast as Adam moves a parameter, until it fires on a few tokens; from there on the loss decides.
    The map stays differentiable throughout, and no other feature is touched. It acts on every architecture with
    a bias (``b_enc``, or ``b_gate`` and ``b_mag`` of a gated one), until a refit begins. In a hard phase with an
    auxiliary loss it changed nothing (docs/experiments.md, 16).

    Source: a threshold that adapts until its unit fires often enough (Földiák 1990, Biological Cybernetics 64,
    165-170). Not in the paper.

    Args:
        window: Training steps without firing, or a share of the run, after which a feature is silent.
        rate: Of the rise, in learning rates a step, dimensionless, ``> 0``. 4 did better than 1, 16 no better.

    Raises:
        ValueError: For a value out of range; at ``setup``, for an SAE without a bias.
    """

    def __init__(self, window: Length = 0.03, rate: float = 4.0) -> None:
        check_length(window, "ReviveSilent.window", at_least=1)
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"ReviveSilent.rate must be a finite number > 0, got {rate}")
        self.window, self.rate = window, rate

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module that does not know who is silent, and SAEs without a bias, before any work."""
        silent_steps(pl_module, self)
        for sae in training_saes(pl_module, self).values():
            if not encoder_biases(sae) and not in_refit(pl_module):
                raise ValueError(
                    f"ReviveSilent raises the encoder's bias, which architecture {sae.cfg.architecture()!r} does not have: "
                    "remove the callback"
                )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know the length of the run."""
        self._window = in_steps(self.window, trainer.estimated_stepping_batches, "ReviveSilent.window")

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Raise the biases."""
        if in_refit(pl_module):
            return
        rise = self.rate * optimizer.param_groups[0]["lr"]
        for name, sae in training_saes(pl_module, self).items():
            silent = silent_steps(pl_module, self)[name] > self._window
            for bias in encoder_biases(sae):
                bias.add_(silent.to(bias.dtype) * rise)
