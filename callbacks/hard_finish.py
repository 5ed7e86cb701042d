"""Turns a penalised run into BatchTopK, TopK or JumpReLU on the same weights for the rest of the run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from aen_lightning.callbacks.modules import adaptive_saes
from aen_lightning.saes.aen_config import HardFinishName
from aen_lightning.saes.hard_phase import check_hard_finish
from aen_lightning.saes.lengths import Length, check_length, in_steps


class HardFinish(pl.Callback):
    """Soft start, hard finish: after a share of the run AEN-SAEs keep the largest activations only.

    The penalty ends there; weights, optimizer state and statistics go on. The penalised phase decides which features there are, the
    hard one takes back what the penalty shrank. L0 is ``k`` from then on, and what is exported is a SAELens ``jumprelu`` or ``topk``
    SAE. Such a run is not differentiable throughout. A function of the optimizer step alone, so a resumed run needs nothing saved.

    Args:
        k: Mean active features per token (a count), ``> 0``; a whole number with ``topk``.
        at: Optimizer step, or share of the run, at which it begins. 0.3 to 0.5 did best (docs/experiments.md).
        finish: ``batchtopk`` keeps the ``k * batch`` largest activations of each batch, and is exported as ``jumprelu``; ``topk`` keeps
            the ``k`` largest of each token, and is exported as ``topk``; ``jumprelu`` keeps as many as ``batchtopk``, but trains a
            threshold for each feature, and is exported as ``jumprelu``; on a GPU its step is dense.

    Raises:
        ValueError: For a value out of range, or a run without an end.
    """

    def __init__(self, k: float, at: Length = 0.4, finish: HardFinishName = "batchtopk") -> None:
        check_hard_finish(k, finish, "HardFinish.")
        check_length(at, "HardFinish.at", at_least=1)
        self.k, self.at, self.finish = k, at, finish

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse SAEs that have no hard phase, or too few features for it, before any work."""
        for sae in adaptive_saes(pl_module, self):
            if not sae.has_hard_phase:
                raise ValueError(
                    f"architecture {sae.cfg.architecture()!r} has no hard phase: remove HardFinish, or train 'aen'"
                )
            if self.k > sae.cfg.d_sae:
                raise ValueError(f"HardFinish.k is {self.k}, but the SAE has d_sae={sae.cfg.d_sae} features")
            sae.prepare_hard_phase(self.finish)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know the end of the run."""
        self._first_hard_step = in_steps(self.at, trainer.estimated_stepping_batches, "HardFinish.at")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Harden the SAEs when it is time."""
        if trainer.global_step >= self._first_hard_step:
            for sae in adaptive_saes(pl_module, self):
                if sae.cfg.hard_k is None:
                    sae.harden(self.k, self.finish)
