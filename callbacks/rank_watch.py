"""Ends a run of several ranks when one of them has stopped, and says which."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from aen_lightning.compat import exit_at_once


class RankWatch(pl.Callback):
    """Every rank says that it is there, and ends itself with code 1 when another has been silent for too long.

    A rank that dies takes the others with it, but one that has stopped (SIGSTOP, a swapping node, a hanging disk) leaves them in
    a collective until the process group's own timeout, half an hour, which does not say who was waited for. Each rank's thread
    leaves a mark in a store on rank 0 a few times in ``timeout_seconds``, and looks at those of the others. Computing for long is no
    silence: the thread goes on beside it.

    Args:
        timeout_seconds: Silence of a rank after which the others end. 0: never.

    Raises:
        ValueError: For a negative time.
    """

    def __init__(self, timeout_seconds: float = 300.0) -> None:
        if timeout_seconds < 0:
            raise ValueError(f"RankWatch.timeout_seconds must be >= 0, got {timeout_seconds}")
        self.timeout_seconds = timeout_seconds
        self._over = threading.Event()
        self._store: dist.TCPStore | None = None
        self._thread: threading.Thread | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to watch, if there is anybody to be watched."""
        if trainer.world_size == 1 or not self.timeout_seconds or not dist.is_initialized():
            return
        host = trainer.strategy.cluster_environment.main_address  # type: ignore[attr-defined]  # of parallel strategies
        wait = timedelta(seconds=self.timeout_seconds)
        is_zero = trainer.global_rank == 0
        store = (
            dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait) if is_zero else None
        )
        port = trainer.strategy.broadcast(store.port if store is not None else 0)
        self._store = store or dist.TCPStore(host, port, is_master=False, timeout=wait)
        self._mark(trainer.global_rank, 0)
        trainer.strategy.barrier("rank watch")  # all have left a mark
        self._over.clear()
        self._thread = threading.Thread(target=self._watch, args=(trainer,), name="rank-watch", daemon=True)
        self._thread.start()

    def _mark(self, rank: int, count: int | str) -> None:
        assert self._store is not None
        self._store.set(f"rank{rank}", str(count))

    def _watch(self, trainer: pl.Trainer) -> None:
        assert self._store is not None
        own, pause = trainer.global_rank, min(5.0, self.timeout_seconds / 5)
        since = dict.fromkeys(range(trainer.world_size), time.monotonic())
        seen: dict[int, bytes] = {}
        count, before = 0, time.monotonic()
        while not self._over.wait(pause):
            count += 1
            now = time.monotonic()
            if (
                now - before > self.timeout_seconds / 2
            ):  # this process was stopped itself: give the others their time
                since = dict.fromkeys(since, now)
            before = now
            try:
                self._mark(own, count)
                marks = {rank: self._store.get(f"rank{rank}") for rank in since}
            except (RuntimeError, OSError):  # the store is rank 0's
                if not self._over.is_set() and self._finished(seen):
                    return
                if not self._over.is_set():
                    self._end(trainer, 0)
                return
            for rank, mark in marks.items():
                if mark != seen.get(rank) or mark == b"done":
                    since[rank], seen[rank] = time.monotonic(), mark
                elif time.monotonic() - since[rank] > self.timeout_seconds:
                    self._end(trainer, rank)

    @staticmethod
    def _finished(seen: dict[int, bytes]) -> bool:
        return seen.get(0) == b"done"

    def _end(self, trainer: pl.Trainer, rank: int) -> None:
        print(
            f"rank {rank} has not answered for {self.timeout_seconds:g} s: rank {trainer.global_rank} (process "
            f"{os.getpid()}) ends. Resume from the last checkpoint; RankWatch.timeout_seconds is the time",
            file=sys.stderr,
            flush=True,
        )
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(9)  # the ranks that this one started
        exit_at_once(1)  # the main thread waits in a collective, which no exception reaches

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch no longer."""
        self._finish(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Watch no longer: what happens now is not silence."""
        self._finish(trainer)

    def _finish(self, trainer: Any) -> None:
        if self._thread is None:
            return
        self._over.set()
        self._thread.join(timeout=self.timeout_seconds)
        self._thread = None
        with suppress(RuntimeError, OSError):  # rank 0 may have left with its store
            self._mark(trainer.global_rank, "done")
