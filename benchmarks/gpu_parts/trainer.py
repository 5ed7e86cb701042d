"""``SAEModule`` under Lightning's Trainer."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from aen_lightning import AENTrainingSAEConfig, sparse
from aen_lightning.sparse import cost
from aen_lightning.training.module import SAEModule
from gpu_parts.problem import CLIP, L1, L2, Problem
from gpu_parts.timing import Waits, free


class _Stream(IterableDataset[Tensor]):
    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.problem.next_batch()


class _Clock(pl.Callback):
    """Times steps 10 on, by events; logging steps are among them, as in a run."""

    def __init__(self, device: str) -> None:
        self.device, self.marks = device, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def ms(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return float(self.marks[3].elapsed_time(self.marks[-1])) / (len(self.marks) - 4)
        return 1e3 * (self.marks[-1] - self.marks[3]) / (len(self.marks) - 4)


class _SyncedSteps(pl.Callback):
    """What waits for the device between two logging steps of a fit."""

    def __init__(self, device: str, first: int, last: int) -> None:
        self.device, self.first, self.last = device, first, last
        self.n_syncs = 0
        self._waits: Any = None

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.first:
            if self.device == "cuda":
                self._waits = warnings.catch_warnings(record=True)
                self.caught = self._waits.__enter__()
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
            else:
                self._waits = Waits()
                self._waits.__enter__()
        elif trainer.global_step == self.last and self._waits is not None:
            if self.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
                self.n_syncs = sum("synchroniz" in str(w.message) for w in self.caught)
            else:
                self.n_syncs = self._waits.n_waits
            self._waits.__exit__(None, None, None)
            self._waits = None


def trainer_steps(problem: Problem, n_steps: int, card: cost.Card | None) -> list[dict[str, Any]]:
    """``SAEModule`` under Lightning's Trainer: float32, bf16, with and without its progress bar."""
    batch, d_in, d_sae = problem.shape
    rows = []
    for precision, bar in (("32-true", False), ("bf16-mixed", False), ("bf16-mixed", True)):
        free(problem.device)
        cfg = AENTrainingSAEConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=L1, l2_coefficient=L2)
        module = SAEModule.from_config(cfg, lr=1e-12)
        with torch.no_grad():
            for name, value in problem.parameters().items():
                getattr(module.sae, name).copy_(value)
        if problem.device == "cpu":  # a CPU's sparse step looks for non-zeros, a GPU's never does
            module.sae.density_switch = sparse.DensitySwitch(threshold=1e-9)
        # logging at steps 1 and n: the steps between are a run's ordinary ones
        clock, synced = _Clock(problem.device), _SyncedSteps(problem.device, 5, n_steps - 2)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = pl.Trainer(
                accelerator="gpu" if problem.device == "cuda" else "cpu", devices=1, precision=precision,
                max_steps=n_steps, log_every_n_steps=n_steps, gradient_clip_val=CLIP, logger=False,
                enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=bar,
                default_root_dir=folder, callbacks=[clock, synced],
            )  # fmt: skip
            trainer.fit(module, DataLoader(_Stream(problem), batch_size=None))
        dense = not module.sae.density_switch.sparse
        path: cost.Path = "dense" if dense else "sparse, rows" if problem.device == "cuda" else "sparse"
        model = cost.Step(batch, d_in, d_sae, problem.l0, low=precision == "bf16-mixed", tf32=True)
        ms = clock.ms()
        rows.append(
            {
                "name": f"SAEModule, {precision}, bar {'on' if bar else 'off'} ({path})",
                "shape": problem.shape,
                "l0": problem.l0,
                "firing": "heavy" if problem.heavy else "uniform",
                "ms": ms,
                "steps_per_s": 1e3 / ms,
                "operations": None,
                "syncs": synced.n_syncs / max(1, synced.last - synced.first),
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if problem.device == "cuda" else None,
                "predicted_ms": sum(model.milliseconds(card, path).values()) if card else None,
                "predicted_gib": sum(model.gibibytes(path).values()),
            }
        )
    return rows
