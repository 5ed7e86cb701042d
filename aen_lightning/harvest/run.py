"""Putting a harvest together."""

from __future__ import annotations

import lightning.pytorch as pl

from aen_lightning.harvest.data import HarvestDataModule
from aen_lightning.harvest.module import HarvestModule
from aen_lightning.harvest.writer import writer_of
from aen_lightning.shards.manifest import Manifest


def run_harvest(trainer: pl.Trainer, module: HarvestModule, datamodule: HarvestDataModule) -> Manifest:
    """Harvest, or finish a harvest that was cut off; returns at once if it is complete.

    Args:
        trainer: With a ``ShardWriter`` among its callbacks; any strategy but FSDP1.
        module: The language model.
        datamodule: The text.

    Returns:
        The manifest of the finished set.

    Raises:
        ValueError: For settings that do not fit together, before any weight is read.
        ShardError: If the folder holds another set, or the disk is too small.
    """
    writer = writer_of(trainer)
    # a hook point that does not exist is an error on every rank, before anything is written
    module.hooks  # noqa: B018
    trainer.predict(module, datamodule=datamodule, return_predictions=False)
    return Manifest.read(writer.path)
