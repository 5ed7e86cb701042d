"""Counts what would make the host wait for a device, on any device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning.pytorch as pl
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal")
# they make views, notes and room, and launch nothing
FREE = (
    "detach", "view", "t", "transpose", "select", "expand", "split", "unsqueeze", "alias", "slice", "squeeze",
    "_unsafe_view", "empty", "empty_like", "promote_types",
)  # fmt: skip


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE and not name.startswith("_record_function"):
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> dict[str, int]:
        return {name: n for name, n in self.operations.items() if name in WAITS}


class WaitsBetween(pl.Callback):
    """Counts from the start of step ``first`` to the start of step ``last``."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.counted = first, last, Waits()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.first:
            self.counted.__enter__()
        elif trainer.global_step == self.last:
            self.counted.__exit__(None, None, None)
