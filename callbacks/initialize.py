"""A start for an SAE's biases that is made from data."""

from __future__ import annotations

from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from sae_lens import TrainingSAE
from torch import Tensor

from aen_lightning.callbacks.modules import encoder_biases, training_saes
from aen_lightning.callbacks.sparsity_target import TargetL0

_CHUNK = 4096  # features whose pre-activations are in memory at a time


class InitializeFromData(pl.Callback):
    """Sets ``b_dec`` to the middle of the first training batch, and ``b_enc`` so that every feature fires on
    a share of it.

    A feature that starts silent on all data has no gradient and stays dead; one that starts on everything
    crowds out others. Works for every architecture with these parameters, before the first step of a run that
    does not resume. On several ranks each batch counts equally.

    Args:
        b_dec: ``mean``; ``geometric_median`` (the point with the least sum of distances, which outliers move
            less); None: as it is.
        active_share: Share of the batch on which each feature fires at first, in (0, 1). None: ``b_enc`` as
            it is.
        l0: The same as a count, in place of ``active_share``: the mean active features per token to start with,
            ``> 0``; each feature fires on ``l0 / d_sae`` of the batch, on one token at least and half at most. ``target``: what
            the run's ``TargetL0`` starts from (``TargetL0.start_l0``), twice its L0 or more.

    Raises:
        ValueError: For a value out of range; at ``setup``, for an SAE without the parameter, and for ``l0: target`` without a
            ``TargetL0``.
    """

    def __init__(
        self,
        b_dec: Literal["mean", "geometric_median"] | None = "mean",
        active_share: float | None = 0.05,
        l0: float | Literal["target"] | None = None,
    ) -> None:
        if b_dec not in ("mean", "geometric_median", None):
            raise ValueError(
                f"InitializeFromData.b_dec must be 'mean', 'geometric_median' or None, got {b_dec!r}"
            )
        if active_share is not None and not 0 < active_share < 1:
            raise ValueError(f"InitializeFromData.active_share must be in (0, 1) or None, got {active_share}")
        if l0 is not None and l0 != "target" and (isinstance(l0, str) or not l0 > 0):
            raise ValueError(f"InitializeFromData.l0 must be above 0, 'target' or None, got {l0!r}")
        self.b_dec, self.active_share, self.l0 = b_dec, active_share, l0
        self._target: TargetL0 | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse SAEs that cannot be started so before any work."""
        if self.l0 == "target":
            callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
            self._target = next((callback for callback in callbacks if isinstance(callback, TargetL0)), None)
            if self._target is None:
                raise ValueError(
                    "InitializeFromData.l0 is 'target', but the run has no TargetL0 to start for: add it, or give a number"
                )
        for sae in training_saes(pl_module, self).values():
            found = {"b_dec": hasattr(sae, "b_dec"), "b_enc": bool(encoder_biases(sae))}
            wanted = {"b_dec": self.b_dec, "b_enc": self._active_share(sae)}
            for name in wanted:
                if wanted[name] is not None and not found[name]:
                    raise ValueError(
                        f"InitializeFromData sets {name}, which architecture {sae.cfg.architecture()!r} "
                        "does not have: "
                        f"give {'active_share: null' if name == 'b_enc' else 'b_dec: null'}"
                    )

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first step: set the biases from its batch."""
        if trainer.global_step > 0 or batch_idx > 0:
            return

        def over_ranks(tensor: Tensor) -> Tensor:
            return cast(Tensor, trainer.strategy.reduce(tensor, reduce_op="mean"))

        for sae in training_saes(pl_module, self).values():
            if self.b_dec is not None:
                middle = batch.mean(dim=0) if self.b_dec == "mean" else geometric_median(batch)
                sae.b_dec.copy_(over_ranks(middle))
            active_share = self._active_share(sae)
            if active_share is not None:
                shifted = batch - sae.b_dec if sae.cfg.apply_b_dec_to_input else batch
                # the greatest is left above the bias: no feature starts silent
                rank = max(1, min(round((1 - active_share) * len(batch)), len(batch) - 1))
                for features in torch.arange(sae.cfg.d_sae, device=batch.device).split(_CHUNK):
                    u = shifted.to(sae.W_enc.dtype) @ sae.W_enc[:, features]
                    bias = -over_ranks(u.kthvalue(rank, dim=0).values)
                    for b_enc in encoder_biases(sae):
                        b_enc[features] = bias

    def _active_share(self, sae: TrainingSAE[Any]) -> float | None:
        if self.l0 is None:
            return self.active_share
        if self.l0 == "target":
            assert self._target is not None  # setup
            return min(0.5, self._target.start_l0(sae.cfg.d_in, sae.cfg.d_sae) / sae.cfg.d_sae)
        return min(0.5, self.l0 / sae.cfg.d_sae)


def geometric_median(x: Tensor, *, n_iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to the rows of ``x``, by Weiszfeld's iteration.

    Args:
        x: Shape (n, d_in).
        n_iterations: At most.
        tolerance: Relative change of the point at which to stop.

    Returns:
        Shape (d_in,).
    """
    point = x.mean(dim=0)
    for _ in range(n_iterations):
        weights = 1 / (x - point).norm(dim=-1, keepdim=True).clamp_min(1e-12)
        moved = (weights * x).sum(dim=0) / weights.sum()
        if (moved - point).norm() <= tolerance * moved.norm():
            return moved
        point = moved
    return point
