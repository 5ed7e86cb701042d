"""Resampling of dead features, the classic remedy of L1 SAEs (Bricken et al. 2023, "Towards Monosemanticity")."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class ResampleDead(pl.Callback):
    """At a few steps gives dead features a new start at tokens that are reconstructed badly.

    A token is drawn with a probability proportional to its squared loss, each at most once a step. The feature's decoder row becomes
    the token's direction (less ``b_dec``), its encoder column the same direction at a fifth of the mean norm of the living columns,
    its bias 0, and Adam's moments of all three 0. Seeded by the step, so a resumed run draws the same.

    Args:
        at: Optimizer steps at which it happens. Who is dead is the module's ``dead_feature_window``.
    """

    def __init__(self, at: list[int]) -> None:
        self.at = frozenset(at)

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Tensor, batch_idx: int
    ) -> None:
        """Resample before the step, if it is one of those."""
        if trainer.global_step not in self.at:
            return
        for tracked in pl_module.tracked:  # type: ignore[union-attr]
            dead = tracked.dead_neuron_mask.nonzero().squeeze(1)
            sae = tracked.sae
            generator = torch.Generator().manual_seed(trainer.global_step)
            loss = (sae(batch) - batch).pow(2).sum(dim=-1).pow(2).cpu()
            dead = dead[torch.randperm(len(dead), generator=generator)[: len(batch)].to(dead.device)]
            if not len(dead):
                continue
            drawn = torch.multinomial(loss, len(dead), generator=generator).to(batch.device)
            direction = torch.nn.functional.normalize(batch[drawn] - sae.b_dec, dim=-1)
            living = ~tracked.dead_neuron_mask
            norm = sae.W_enc[:, living].norm(dim=0).mean() if living.any() else 1.0
            sae.W_dec[dead] = direction
            sae.W_enc[:, dead] = 0.2 * norm * direction.T
            sae.b_enc[dead] = 0
            tracked.n_forward_passes_since_fired[dead] = 0
            _forget(trainer.optimizers[0], {sae.W_dec: (dead,), sae.W_enc: (..., dead), sae.b_enc: (dead,)})


def _forget(optimizer: torch.optim.Optimizer, entries: dict[Tensor, Any]) -> None:
    for parameter, where in entries.items():
        state = optimizer.state.get(parameter, {})
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name][where] = 0
