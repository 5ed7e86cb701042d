"""Times, waits and memory of a step."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aen_lightning.sparse import cost
from gpu_parts.contestants import OurStep
from gpu_parts.problem import SILENT, Problem

FREE = (
    "detach", "view", "t", "transpose", "select", "expand", "split", "unsqueeze", "alias", "slice", "squeeze",
    "_unsafe_view", "empty", "empty_like",
)  # views, and room: they launch nothing  # fmt: skip
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


def timed(step: Callable[[], Any], device: str, *, warmup: int, repeats: int) -> list[float]:
    """Milliseconds of each of ``repeats`` steps, by events of the device."""
    for _ in range(warmup):
        step()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


class Waits(TorchDispatchMode):
    """Counts the operations that are more than a view, and those for which the host would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.n_waits = self.n_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n_operations += func.overloadpacket.__name__ not in FREE
        self.n_waits += func.overloadpacket.__name__ in WAITS
        return func(*args, **(kwargs or {}))


def waits_of(step: Callable[[], Any], device: str) -> tuple[int, int]:
    """How often a step makes the host wait for the device, and of how many operations it consists."""
    with Waits() as counted:
        step()
    if device == "cpu":
        return counted.n_waits, counted.n_operations
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught), counted.n_operations


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_step(
    name: str, problem: Problem, make: Callable[[], Any], repeats: int, card: cost.Card | None
) -> dict[str, Any]:
    free(problem.device)
    contestant = make()
    if isinstance(contestant, OurStep):
        timed(contestant.step, problem.device, warmup=2, repeats=1)
        contestant.rest()
    times = timed(contestant.step, problem.device, warmup=3, repeats=repeats)
    waits, operations = waits_of(contestant.step, problem.device)
    batch, d_in, d_sae = problem.shape
    model = cost.Step(batch, d_in, d_sae, problem.l0, silent=SILENT if problem.heavy else 0.0)
    median = statistics.median(times)
    return {
        "name": name, "shape": problem.shape, "l0": problem.l0, "firing": "heavy" if problem.heavy else "uniform",
        "ms": median, "steps_per_s": 1e3 / median, "operations": operations, "syncs": waits,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if problem.device == "cuda" else None,
        "predicted_ms": sum(model.milliseconds(card, contestant.path).values()) if card else None,
        "predicted_gib": sum(model.gibibytes(contestant.path).values()),
    }  # fmt: skip
