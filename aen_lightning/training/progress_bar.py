"""Values in Lightning's progress bar that cost nothing between logging steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl


def show_in_bar(bar: Any, values: Mapping[str, float]) -> Callable[[], None]:
    """Let a Trainer's progress bar show ``values``, as they are whenever it is drawn.

    Lightning's own way, ``log(..., prog_bar=True)``, fetches each value from the device at every step.

    Args:
        bar: ``trainer.progress_bar_callback``; None if there is none.
        values: By name.

    Returns:
        Undoes it.
    """
    if not isinstance(bar, pl.callbacks.ProgressBar):
        return lambda: None
    usual = bar.get_metrics

    def get_metrics(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {**usual(trainer, pl_module), **values}

    bar.get_metrics = get_metrics  # type: ignore[method-assign]

    def undo() -> None:
        if vars(bar).get("get_metrics") is get_metrics:
            del bar.get_metrics

    return undo
