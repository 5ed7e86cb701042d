"""Writes the dictionary as a SAELens folder with every checkpoint and at the end of the fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, cast

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from aen_lightning.callbacks.dead_features import DeadFeatureTracker
from aen_lightning.callbacks.modules import training_saes
from aen_lightning.runs.layout import DICTIONARIES_FOLDER, FINAL_FOLDER, step_folder


class _Exportable(Protocol):
    def export(self, path: str | Path, log_sparsity: Tensor | None = None, *, name: str = "") -> Path: ...


class ExportSAE(pl.Callback):
    """Leaves a folder that ``SAE.load_from_disk`` reads: ``<dirpath>/step_<n>`` with every checkpoint,
    ``<dirpath>/final`` at the end.

    With several SAEs each gets a folder of its name below these. Only rank 0 writes, and nothing here waits
    for another rank, unless the features are sharded over the ranks.

    Args:
        dirpath: Where the folders go. None: ``sae`` below the logger's folder, or below the Trainer's
            ``default_root_dir``.
        with_checkpoints: Write a folder with every checkpoint, not only at the end.
    """

    def __init__(self, dirpath: str | None = None, with_checkpoints: bool = True) -> None:
        self.dirpath = dirpath
        self.with_checkpoints = with_checkpoints
        self.resolved_dirpath: Path | None = None
        self.last_path: Path | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Settle the folder on every rank (Lightning broadcasts its log folder) before anything can fail."""
        if stage != "fit":
            return
        training_saes(pl_module, self)
        if not hasattr(pl_module, "export"):
            raise TypeError(
                f"ExportSAE needs a module with an `export` method, got {type(pl_module).__name__}"
            )
        default = Path(trainer.log_dir or trainer.default_root_dir) / DICTIONARIES_FOLDER
        self.resolved_dirpath = default if self.dirpath is None else Path(self.dirpath)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the dictionary beside a checkpoint that is being saved during the fit."""
        if self.with_checkpoints and trainer.state.fn == TrainerFn.FITTING:
            self.export(trainer, pl_module, step_folder(trainer.global_step))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the final dictionary and say where it is."""
        path = self.export(trainer, pl_module, FINAL_FOLDER)
        if path is not None:
            rank_zero_info(f"SAELens dictionary written to {path} (read it with sae_lens.SAE.load_from_disk)")

    def export(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> Path | None:
        """Write the dictionaries as they are now, on rank 0; returns the folder, None if nothing was written."""
        # where each rank holds a part of the features, all of them write
        writes = trainer.is_global_zero or getattr(pl_module, "shard_features", False)
        if not writes or trainer.global_step == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        if self.resolved_dirpath is None:
            raise RuntimeError("ExportSAE was not set up: it works inside Trainer.fit only")
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trackers = [c for c in callbacks if isinstance(c, DeadFeatureTracker)]
        path = self.resolved_dirpath / name
        for sae_name in training_saes(pl_module, self):
            log_sparsity = trackers[0].log_sparsity(sae_name) if trackers else None
            cast(_Exportable, pl_module).export(path / sae_name, log_sparsity, name=sae_name)
        self.last_path = path
        return path
