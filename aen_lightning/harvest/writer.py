"""A Lightning callback that writes a harvest to disk while the model computes on."""

from __future__ import annotations

import queue
import shutil
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from aen_lightning.device_copies import HostCopy, side_stream
from aen_lightning.harvest.tokens import TOKENS_FOLDER
from aen_lightning.shards.manifest import Manifest, ShardRecord
from aen_lightning.shards.write import ShardFolder, ShardStream

REQUEUE_CODE = 75
"""Exit code of a harvest that SIGTERM stopped: EX_TEMPFAIL of sysexits.h, start it again."""


class ShardWriter(BasePredictionWriter):
    """Writes what ``HarvestModule`` predicts as shards, in a thread of its own, and hashes them in another.

    Batches go straight into the open shard's file, so at most ``queue_size`` batches are held in memory; if
    the disk is slower than the model, the model waits. From a GPU they are copied to pinned memory beside the
    model's work.

    Args:
        path: Folder of the set.
        shard_size_mib: About the size of a shard, MiB. A run that is cut off loses at most one unfinished
            shard per rank.
        force_disk: Begin even if the disk seems too small.
        queue_size: Batches waiting to be written.
        on_non_finite: What a row of activations with a nan or an infinity does. ``stop``: it ends the harvest, with
            its place. ``skip``: it is left out, and counted in the manifest (``counts``).
    """

    def __init__(
        self,
        path: str,
        shard_size_mib: float = 256,
        force_disk: bool = False,
        queue_size: int = 4,
        on_non_finite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__("batch")
        if shard_size_mib <= 0:
            raise ValueError(f"shard_size_mib must be above 0, got {shard_size_mib}")
        if queue_size < 1:
            raise ValueError(f"queue_size must be at least 1, got {queue_size}")
        if on_non_finite not in ("stop", "skip"):
            raise ValueError(f"on_non_finite must be 'stop' or 'skip', got {on_non_finite!r}")
        self.on_non_finite = on_non_finite
        self.path, self.shard_size_mib, self.force_disk = Path(path), shard_size_mib, force_disk
        self._queue: queue.Queue[tuple[dict[str, Any], dict[str, Any]] | None] = queue.Queue(queue_size)
        self._copy_stream: torch.cuda.Stream | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._d_in: dict[str, int] = {}
        self._dtype = ""
        self._rank = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See base class. Lightning looks for indices of a sampler, which shards do not need."""
        super().setup(trainer, pl_module, stage)
        warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the thread."""
        self._d_in, self._dtype, self._error = pl_module.d_in, pl_module.stored_dtype, None
        self._rank = trainer.global_rank
        self._copy_stream = side_stream(pl_module.device)
        self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)
        self._thread.start()

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Hand a batch to the thread; raises what went wrong there.

        Raises:
            SystemExit: With 75, if SIGTERM asked for it; Lightning's predict loop does not look.
        """
        if trainer.received_sigterm:
            rank_zero_info(
                "harvest stopped by SIGTERM: the same command goes on after the shards that are finished"
            )
            raise SystemExit(REQUEUE_CODE)
        if batch["wanted"]:
            place = {k: batch[k] for k in ("shard", "capacity", "last", "n_read", "n_special")}
            place["batch"] = batch_idx
            copies = {
                "activations": {
                    name: HostCopy(x, self._copy_stream) for name, x in prediction["activations"].items()
                },
                "token_ids": HostCopy(prediction["token_ids"], self._copy_stream),
            }
            self._put((place, prediction | copies))

    def _put(self, item: tuple[dict[str, Any], dict[str, Any]] | None) -> None:
        while True:
            if self._error is not None:
                raise self._error
            try:
                return self._queue.put(item, timeout=1.0)  # wake up to see an error of the thread
            except queue.Full:
                continue

    def _run(self) -> None:
        stream: ShardStream | None = None
        sealing: list[Future[ShardRecord]] = []
        sealer = ThreadPoolExecutor(1, "shard-sealer")
        try:
            while (item := self._queue.get()) is not None:
                place, prediction = item
                if stream is None:
                    stream = ShardStream(
                        self.path, place["shard"], self._d_in, self._dtype, place["capacity"]
                    )
                activations = {name: copy.wait() for name, copy in prediction["activations"].items()}
                activations, token_ids, n_bad = self._finite(
                    activations, prediction["token_ids"].wait(), place
                )
                stream.append(activations, token_ids)
                stream.count(
                    read=place["n_read"], special=place["n_special"], outlier=prediction["n_outliers"]
                )
                if n_bad:
                    stream.count(non_finite=n_bad)
                if place["last"]:
                    for earlier in sealing:  # at most one shard waits to be hashed
                        earlier.result()
                    sealing = [sealer.submit(stream.finish_writing())]
                    stream = None
            for earlier in sealing:
                earlier.result()
        except Exception as e:  # noqa: BLE001  # raised again in the main thread
            self._error = e
        finally:
            sealer.shutdown()
            if stream is not None:
                stream.abort()

    def _finite(
        self, activations: dict[str, Tensor], token_ids: Tensor, place: dict[str, Any]
    ) -> tuple[dict[str, Tensor], Tensor, int]:
        """The rows that are finite at every hook point, and how many are not; here the model need not wait for it."""
        finite = torch.ones(len(token_ids), dtype=torch.bool)
        for hook, x in activations.items():
            at_hook = x.sum(-1, dtype=torch.float32).isfinite()
            if self.on_non_finite == "stop" and not at_hook.all():
                raise ValueError(
                    f"{int((~at_hook).sum())} of {len(x)} rows of activations at {hook!r} are not finite (shard "
                    f"{place['shard']}, batch {place['batch']} of rank {self._rank}): the model has diverged or "
                    f"{self._dtype} cannot hold it; set shards.on_non_finite to skip to leave such rows out"
                )
            finite &= at_hook
        if finite.all():
            return activations, token_ids, 0
        return {hook: x[finite] for hook, x in activations.items()}, token_ids[finite], int((~finite).sum())

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait until all is on disk, on all ranks; then rank 0 finishes the set."""
        self._put(None)
        self._join()
        trainer.strategy.barrier("shards written")
        if trainer.is_global_zero:
            self.finish()
        trainer.strategy.barrier("manifest written")

    def _join(self) -> None:
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        if self._error is not None:
            raise self._error

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Stop the thread; an unfinished shard leaves nothing behind."""
        if self._thread is not None:
            self._error = self._error or exception
            while self._thread.is_alive():
                try:
                    self._queue.put(None, timeout=0.1)
                except queue.Full:
                    continue
                self._thread.join(1.0)
            self._thread = None

    def finish(self) -> Manifest:
        """Mark the set as complete, and drop the work orders (rank 0, once all shards are there)."""
        manifest = ShardFolder(self.path).collect(complete=True)
        self.drop_work_orders()
        return manifest

    def drop_work_orders(self) -> None:
        """Remove the rows of tokens that the shards were made of, if they are still there."""
        shutil.rmtree(self.path / TOKENS_FOLDER, ignore_errors=True)


def writer_of(trainer: pl.Trainer) -> ShardWriter:
    """The ``ShardWriter`` among a trainer's callbacks.

    Raises:
        ValueError: If there is not exactly one.
    """
    writers = [c for c in trainer.callbacks if isinstance(c, ShardWriter)]  # type: ignore[attr-defined]
    if len(writers) != 1:
        raise ValueError(f"a harvest needs one ShardWriter among the trainer's callbacks, got {len(writers)}")
    return writers[0]
