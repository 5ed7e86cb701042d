"""The optimizer of a run: which Adam takes the steps, how gradients are clipped, what follows a step."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from aen_lightning import sharded, sparse
from aen_lightning.saes.aen import AENTrainingSAE
from aen_lightning.sparse import backend
from aen_lightning.training.sae_holder import SAEHolder


class SAEOptimization(SAEHolder):
    """The part of the training module that optimizes."""

    compile_sae: bool
    in_refit = False
    """Whether the run has come to its refit."""

    def begin_refit(self) -> None:
        """From the next step on train what a refit trains (:mod:`aen_lightning.saes.relaxed`).

        The optimizer starts anew, its learning rate goes on.
        """
        before, schedule = self.trainer.optimizers[0], self._schedule().state_dict()
        for tracked in self.tracked:
            tracked.begin_refit()
        self.in_refit = True
        self.trainer.strategy.setup_optimizers(self.trainer)
        groups = self.trainer.optimizers[0].param_groups
        for old, new in zip(before.param_groups, groups, strict=True):
            new["lr"], new["initial_lr"] = old["lr"], old["initial_lr"]
        self._schedule().load_state_dict(schedule)

    def _schedule(self) -> Any:
        return self.trainer.lr_scheduler_configs[0].scheduler

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer with a parameter group per SAE, and SAELens's learning-rate schedule, stepped once
        per optimizer step.
        """
        optimizer_class: type[torch.optim.Optimizer] | None = None
        if self._lays_encoders_feature_by_feature():
            # the layout of the step on the non-zeros, and the Adam that keeps to it; the same numbers as
            # torch's
            for sae in self._adaptive_saes():
                sparse.feature_major_(sae.W_enc)
            optimizer_class = sparse.RowAdam if self._updates_rows() else sparse.FusedAdam
        configured = self.optimizer_settings.configure(
            [tracked.sae.parameters() for tracked in self.tracked],
            training_steps=self.trainer.estimated_stepping_batches,
            device=self.device,
            scaled_gradients=self._scales_gradients(),
            optimizer_class=optimizer_class,
        )
        if isinstance(rows := cast("dict[str, Any]", configured)["optimizer"], sparse.RowAdam):
            rows.low_dtype = torch.bfloat16 if str(self.trainer.precision) == "bf16-mixed" else None
            for sae in self._adaptive_saes():
                rows.hold_rows(sae.W_dec, partial(getattr, sae, "decoder_norm"))
        return configured

    def _updates_rows(self) -> bool:
        """Whether Adam runs as this package's kernel, which clips, projects and leaves out silent rows."""
        return all(
            sae.dtype == torch.float32 and backend.triton_serves(sae.W_enc.device)
            for sae in self.saes.values()
        )

    def _lays_encoders_feature_by_feature(self) -> bool:
        return (
            self.optimizer_settings.is_plain_adam
            and not self.shard_features
            and not self._scales_gradients()
            and self.trainer.world_size
            == 1  # DDP and FSDP lay out their buckets before the optimizer is made
            and not self.compile_sae
            and any(sae.sparse_step_applies() for sae in self._adaptive_saes())
            and sparse.FusedAdam.supported()
        )

    def _scales_gradients(self) -> bool:
        return str(self.trainer.precision) == "16-mixed"

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer asks, each SAE's gradients by their own norm: as in separate runs.

        Lightning refuses to clip for a fused optimizer in any mixed precision, though only scaled losses forbid it.
        """
        if self.shard_features and gradient_clip_val:
            sharded.clip_gradients_(self.parameters(), gradient_clip_val, algorithm=gradient_clip_algorithm)
            return
        adam = self.trainer.optimizers[0]
        saes = list(self.saes.values())
        if gradient_clip_algorithm != "value" and self._clips_in_its_kernel(adam):
            for sae, group in zip(self.saes.values(), adam.param_groups, strict=True):
                if isinstance(sae, AENTrainingSAE):  # as alone: another architecture gets another Adam there
                    group["max_norm"] = gradient_clip_val
                    saes.remove(sae)
        own = len(self.tracked) > 1 or str(self.trainer.precision) == "bf16-mixed"
        if not own or not gradient_clip_val:
            if saes:
                self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for sae in saes:
            if gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(sae.parameters(), gradient_clip_val)
            else:
                nn.utils.clip_grad_norm_(sae.parameters(), gradient_clip_val)

    def _clips_in_its_kernel(self, optimizer: torch.optim.Optimizer) -> bool:
        return isinstance(optimizer, sparse.RowAdam) or (
            isinstance(optimizer, sparse.FusedAdam)
            and all(p.dtype == torch.float32 for group in optimizer.param_groups for p in group["params"])
        )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer's step, then the decoder rows back to unit norm."""
        super().optimizer_step(*args, **kwargs)
        rows = self.trainer.optimizers[0]
        for sae in self._adaptive_saes():
            if not (isinstance(rows, sparse.RowAdam) and rows.holds_rows(sae.W_dec)):
                sae.normalize_decoder()
