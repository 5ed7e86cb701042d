"""How one forward pass is embedded in a run: what an SAE cannot know and its driver can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def _one_process(tensor: Tensor) -> Tensor:
    return tensor


@dataclass
class StepSchedule:
    """Handed to :meth:`AENTrainingSAE.scheduled_forward_pass` with every batch by whoever drives the SAE.

    The SAE keeps nothing of it, so that one trained under Lightning trains under SAELens's trainer as well.

    Args:
        refresh_weights: Whether this step recomputes the adaptive weights; the running means move at every
            step.
        n_micro_batches: Batches that make one optimizer step (gradient accumulation). Each moves the running
            means by ``beta^(1/n)``, so that their half-life stays in optimizer steps.
        reduce_mean: Mean of a tensor over the ranks. Ranks must have equally large batches.
        n_dead_at_most: No more features than these are dead in this step. None: nobody knows, and where the number
            matters the host waits for it.
    """

    refresh_weights: bool = True
    n_micro_batches: int = 1
    reduce_mean: Callable[[Tensor], Tensor] = _one_process
    n_dead_at_most: int | None = None
