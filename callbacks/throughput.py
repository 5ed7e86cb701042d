"""Training speed, in tokens per second."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl


class Throughput(pl.Callback):
    """Logs ``details/tokens_per_second``.

    Activation vectors trained on per second, all ranks together, since the last log.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._n_tokens = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._since, self._n_tokens = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log at the Trainer's logging steps."""
        self._n_tokens += outputs["n_tokens"]
        if trainer.global_step % trainer.log_every_n_steps or self._since is None:  # type: ignore[attr-defined]
            return
        now = time.perf_counter()
        pl_module.log("details/tokens_per_second", self._n_tokens / (now - self._since))
        self._since, self._n_tokens = now, 0
