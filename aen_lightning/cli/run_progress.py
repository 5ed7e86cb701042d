"""The progress of a Trainer's run, shown as that of all other work."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from aen_lightning.progress import Task, working

_NOTE_EVERY_S = 1.0  # reading a metric waits for the GPU


class RunProgress(ProgressBar):
    """Steps of a fit with its loss, L0, explained variance and dead features; batches of anything else.

    On a terminal a bar, in a file a line every ten seconds, and nothing with ``aen --quiet``.

    Args:
        training: What the fit is called.
    """

    def __init__(self, training: str = "training") -> None:
        super().__init__()
        self._training = training
        self._open = ExitStack()
        self._task = Task("")
        self._enabled = True
        self._noted = 0.0

    def disable(self) -> None:
        """Called by Lightning on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """See base class."""
        self._enabled = True

    def _begin(self, what: str, total: float, unit: str, done: int = 0) -> None:
        self._end()
        if self._enabled:
            whole = int(total) if math.isfinite(total) and total > 0 else None
            self._task = self._open.enter_context(working(what, whole, unit))
            self._task.done = self._task.start = done

    def _end(self) -> None:
        self._open.close()

    # --- fit -----------------------------------------------------------------------------------------------
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See base class."""
        steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
        self._begin(self._training, steps, "steps", done=trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """See base class."""
        self._task.done = trainer.global_step
        if self._enabled and time.monotonic() - self._noted > _NOTE_EVERY_S:
            metrics = self.get_metrics(trainer, pl_module)
            self._task.note = ", ".join(
                f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float)
            )
            self._noted = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See base class."""
        self._end()

    # --- validate, test, predict: of a fit's own validation the training line says enough ---------------------
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See base class."""
        if trainer.state.fn == "validate":
            self._begin("validating", self.total_val_batches, "batches")

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """See base class."""
        if trainer.state.fn == "validate":
            self._task.done += 1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See base class."""
        if trainer.state.fn == "validate":
            self._end()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See base class."""
        self._begin("testing", sum(trainer.num_test_batches), "batches")

    def on_test_batch_end(self, *_: Any) -> None:
        """See base class."""
        self._task.done += 1

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See base class."""
        self._end()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See base class."""
        self._begin("harvesting", sum(trainer.num_predict_batches), "batches")

    def on_predict_batch_end(self, *_: Any) -> None:
        """See base class."""
        self._task.done += 1

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See base class."""
        self._end()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """See base class."""
        self._end()
