"""Saves a run that is told to end, at a step boundary and on every rank, so that it can go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from aen_lightning.callbacks.export import ExportSAE
from aen_lightning.compat import requeue_signal
from aen_lightning.files import put_in_place
from aen_lightning.runs.layout import (
    CHECKPOINTS_FOLDER,
    INTERRUPTED_CHECKPOINT,
    INTERRUPTED_FOLDER,
    next_slurm_checkpoint,
)

REQUEUE_CODE = 75
"""Exit code of a run that SIGTERM or a scheduler's signal stopped: EX_TEMPFAIL of sysexits.h, start it again."""
CTRL_C_CODE = 130
"""Exit code of a run that ctrl-C stopped: 128 + SIGINT, as of any program."""

_SAME_SIGNAL_SECONDS = 1.0


class Interrupted(SystemExit):
    """A run that was saved because a signal asked it to end.

    As a ``SystemExit`` it ends a program with its code unless it is caught: 75 or 130 on rank 0, and 0 on the others, since
    Lightning's launcher kills a whole run when a process that it started fails.

    Args:
        signum: The signal.
        step: Optimizer steps that are done.
        checkpoint: What the run goes on from.
        is_global_zero: Whether this is rank 0.
    """

    def __init__(self, signum: int, step: int, checkpoint: Path, *, is_global_zero: bool) -> None:
        code = CTRL_C_CODE if signum == signal.SIGINT else REQUEUE_CODE
        super().__init__(code if is_global_zero else 0)
        self.signum, self.step, self.checkpoint = signum, step, checkpoint

    def __str__(self) -> str:
        return f"interrupted by {signal.Signals(self.signum).name} after step {self.step}"


class SaveOnSignal(Checkpoint):
    """On SIGTERM, ctrl-C, or SLURM's signal of a requeue: save, export ``sae/interrupted``, end with :class:`Interrupted`.

    The handler sets a flag only. What is done happens at the next boundary between optimizer steps, at the same one on all
    ranks, whichever of them got the signal. A second SIGTERM or ctrl-C ends the process at once (143, 130). Under SLURM the
    checkpoint also gets the name from which Lightning resumes a requeued job, and after the requeue signal (USR1) the job
    is requeued. It is a ``Checkpoint`` so that Lightning calls it after all other callbacks, with their state up to date.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._since = 0.0
        self._step = 0
        self._group: Any = None
        self._flag: torch.Tensor | None = None
        self._pending: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the place of Lightning's handlers, which save in the middle of a step or not at all.

        Lightning restores those of the program when the fit ends.
        """
        # one that came while the model was loading is Lightning's to know
        self._signum = signal.SIGTERM if trainer.received_sigterm else 0
        self._step, self._pending = trainer.global_step, None
        self._group = None
        if trainer.world_size > 1 and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")  # on the CPU: agreeing waits for no accelerator
        signals = {signal.SIGTERM, signal.SIGINT, requeue_signal(trainer)}
        try:
            for signum in signals - {None}:
                signal.signal(signum, self._note)  # type: ignore[arg-type]
        except ValueError:  # not the main thread, where Python allows no handlers
            rank_zero_warn("training in a thread: signals will end this process without saving")

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        ends = signum in (signal.SIGTERM, signal.SIGINT)
        # a launcher passes on to its processes what a terminal or scheduler has sent them already
        if (
            ends
            and self._signum in (signal.SIGTERM, signal.SIGINT)
            and now - self._since > _SAME_SIGNAL_SECONDS
        ):
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if self._signum == 0:
            self._signum, self._since = signum, now

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At a step boundary, see whether any rank was told to end."""
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        signum = self._agreed()
        if signum and trainer.global_step != trainer.max_steps:  # else the end is nearer than a checkpoint
            raise self._save(trainer, pl_module, signum)

    def _agreed(self) -> int:
        """The signal that all ranks act on at this step, or 0.

        Ranks ask each other in the background, and each answer is looked at one step later, when it has long been there.
        """
        if self._group is None:
            return self._signum
        agreed = 0
        if self._pending is not None:
            self._pending.wait()
            assert self._flag is not None
            agreed = int(self._flag)
        self._flag = torch.tensor(self._signum)
        self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave no question open between the ranks."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, signum: int) -> Interrupted:
        self.on_train_end(trainer, pl_module)
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        path = folder / CHECKPOINTS_FOLDER / INTERRUPTED_CHECKPOINT
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        exporters = [c for c in callbacks if isinstance(c, ExportSAE)]
        wanted = [exporter.with_checkpoints for exporter in exporters]
        for exporter in exporters:
            exporter.with_checkpoints = False  # the dictionary gets a folder of its own
        try:
            trainer.save_checkpoint(path)
        finally:
            for exporter, with_checkpoints in zip(exporters, wanted, strict=True):
                exporter.with_checkpoints = with_checkpoints
        said = f"checkpoint {path}"
        for exporter in exporters:
            said += f", dictionary {exporter.export(trainer, pl_module, INTERRUPTED_FOLDER)}"
        interrupted = Interrupted(signum, trainer.global_step, path, is_global_zero=trainer.is_global_zero)
        rank_zero_info(f"{interrupted}: {said}")
        if requeue_signal(trainer) is not None and trainer.is_global_zero:
            _name_for_slurm(path, Path(trainer.default_root_dir))
            if signum == requeue_signal(trainer):
                _requeue()
        trainer.strategy.barrier("interrupted")
        return interrupted


def _name_for_slurm(path: Path, root: Path) -> None:
    """Give a checkpoint the name under which Lightning looks for it when the job starts again."""
    target = next_slurm_checkpoint(root)
    try:
        os.link(path, target)
    except OSError:  # another file system, or one without links
        # not beside it under a name like its own: Lightning reads the numbers of all names like this
        temporary = root / f".interrupted.{os.getpid()}.tmp"
        shutil.copyfile(path, temporary)
        put_in_place(temporary, target)


def _requeue() -> None:
    """Ask SLURM to start this job again."""
    job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not job:
        rank_zero_warn("SLURM_JOB_ID is not set: the run is saved, requeue the job by hand")
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or error
        rank_zero_warn(
            f"the run is saved, but `scontrol requeue {job}` failed ({detail}): requeue it by hand"
        )
