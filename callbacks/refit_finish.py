"""Ends a run with the relaxed refit of its dictionary."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from aen_lightning.callbacks.hard_finish import HardFinish
from aen_lightning.callbacks.modules import in_refit, training_saes
from aen_lightning.saes.lengths import Length, check_length, in_steps
from aen_lightning.saes.relaxed import REFITTED


class RefitFinish(pl.Callback):
    """For the last part of a run keeps which features fire and refits their magnitudes and the decoder, without a penalty.

    What ``aen refit`` does to an exported dictionary, in the same run: L0 and dead features stay, what an L1 penalty shrank is
    restored. The encoder is fixed from then on, the optimizer starts anew, and the learning rate's schedule goes on. What is exported
    is a SAELens ``jumprelu`` SAE. The checkpoint knows the phase,
    so a resumed run goes on in it. One process only.

    Args:
        at: Optimizer step, or share of the run, at which it begins.

    Raises:
        ValueError: For a value out of range, a run without an end; at ``setup``, for an architecture without thresholds, and for
            several processes.
    """

    def __init__(self, at: Length = 0.85) -> None:
        check_length(at, "RefitFinish.at", at_least=1)
        self.at = at

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be refitted before any work."""
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise ValueError(
                f"RefitFinish runs in one process, got {trainer.world_size}: use aen refit on the exported dictionary"
            )
        if not hasattr(pl_module, "begin_refit"):
            raise TypeError(f"RefitFinish needs a module that can refit, got {type(pl_module).__name__}")
        if getattr(pl_module, "shard_features", False):
            raise ValueError(
                "RefitFinish does not go with shard_features: use aen refit on the exported dictionary"
            )
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        to_topk = any(isinstance(c, HardFinish) and c.finish == "topk" for c in callbacks)
        for sae in training_saes(pl_module, self).values():
            exported = "topk" if to_topk else sae.cfg.get_inference_config_class().architecture()
            if exported not in REFITTED:
                raise ValueError(
                    f"RefitFinish needs features that fire above a threshold, but {sae.cfg.architecture()!r} is exported as "
                    f"{exported!r}: remove the callback"
                )
            if sae.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
                raise ValueError(
                    f"RefitFinish does not go with normalize_activations={sae.cfg.normalize_activations!r}, which acts inside the "
                    "SAE: scale the data instead"
                )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know the end of the run."""
        self._first_step = in_steps(self.at, trainer.estimated_stepping_batches, "RefitFinish.at")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin when it is time."""
        if trainer.global_step >= self._first_step and not in_refit(pl_module):
            pl_module.begin_refit()  # type: ignore[operator]
