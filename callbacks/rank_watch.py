"""Ends a run of several ranks when one of them has stopped, and says which."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl

from aen_lightning.compat import exit_at_once

EXIT_CODE = 1


class RankWatch(pl.Callback):
    """Every rank shows that it is alive, and ends itself when another has not done so for too long.

    A rank that dies takes the others with it. One that has stopped (SIGSTOP, a node that swaps, a disk that hangs)
    leaves them in a collective until the process group's own timeout, half an hour, which does not say whom they
    waited for. Here a thread of each rank touches a file in the run's folder, five times in ``timeout_s``, and looks
    at those of the others. A long computation is no silence: the thread goes on beside it. The ranks need one
    file system, as for checkpoints; their clocks need not agree.

    Args:
        timeout_s: Seconds of silence of a rank after which the others end with exit code 1. 0: never.

    Raises:
        ValueError: For a negative time.
    """

    def __init__(self, timeout_s: float = 300.0) -> None:
        if not timeout_s >= 0:
            raise ValueError(f"RankWatch.timeout_s must be >= 0 seconds (0: never), got {timeout_s}")
        self.timeout_s = timeout_s
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to watch, if there is anybody to be watched."""
        self._begin(trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Likewise for a harvest."""
        self._begin(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        if trainer.world_size == 1 or not self.timeout_s:
            return
        root = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir asks rank 0: the same on all
        self._folder = root / f".alive-{trainer.strategy.broadcast(os.getpid())}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file(trainer.global_rank).touch()
        trainer.strategy.barrier("all ranks have their file")
        self._over.clear()
        self._thread = threading.Thread(target=self._watch, args=(trainer,), name="rank-watch", daemon=True)
        self._thread.start()

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}"

    def _watch(self, trainer: pl.Trainer) -> None:
        own, pause = trainer.global_rank, self.timeout_s / 5
        before = time.monotonic()
        seen = {rank: (0, before) for rank in range(trainer.world_size) if rank != own}
        while not self._over.wait(pause):
            now = time.monotonic()
            if now - before > self.timeout_s / 2:  # this process was stopped: the others get their time again
                seen = {rank: (mark, now) for rank, (mark, _) in seen.items()}
            before = now
            with suppress(FileNotFoundError):  # the run is over, and this rank about to hear of it
                os.utime(self._file(own))
            for rank, (mark, since) in list(seen.items()):
                new = self._mark(rank)
                if new is None:
                    del seen[rank]
                elif new != mark:
                    seen[rank] = new, now
                elif now - since > self.timeout_s and not self._over.is_set():
                    self._end(trainer, rank)

    def _mark(self, rank: int) -> int | None:
        """When a rank was last alive, by the file system's clock; None if it has finished."""
        try:
            # opened, since a network file system then asks its server
            with self._file(rank).open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _end(self, trainer: pl.Trainer, rank: int) -> None:
        sys.stderr.write(
            f"rank {rank} has shown no sign of life for {self.timeout_s:g} s (RankWatch.timeout_s): rank "
            f"{trainer.global_rank} (process {os.getpid()}) ends. Start it again to go on, a training with --resume auto\n"
        )
        sys.stderr.flush()
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(9)  # the ranks that this one started
        exit_at_once(EXIT_CODE)  # the main thread waits in a collective, which no exception reaches

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch no longer."""
        self._finish(trainer)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch no longer."""
        self._finish(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Watch no longer: what happens now is not silence."""
        self._finish(trainer)

    def _finish(self, trainer: pl.Trainer) -> None:
        if self._thread is None:
            return
        self._over.set()
        self._thread.join(timeout=self.timeout_s)
        self._thread = None
        self._file(trainer.global_rank).unlink(missing_ok=True)
        with suppress(OSError):  # not empty: others have not finished
            self._folder.rmdir()
