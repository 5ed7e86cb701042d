"""``aen sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl

from aen_lightning.cli.training import AENCLI, TRAINING_OPTIONS, prepare_arguments
from aen_lightning.training.module import SweepModule
from aen_lightning.training.pareto import sweep_table, write_table


def sweep_command(args: Sequence[str]) -> int:
    """Expand the lists in a config into a grid, train all of it on one stream, and write one table.

    The arguments are those of ``aen fit``; ``model.sae`` may hold lists, or be a list of dicts.
    """
    prepare_arguments(["fit", *args])
    cli = AENCLI(SweepModule, pl.LightningDataModule, **TRAINING_OPTIONS)
    table = sweep_table(cli.trainer, cli.model, cli.datamodule)
    if cli.trainer.is_global_zero:
        folder = Path(cli.trainer.log_dir or cli.trainer.default_root_dir)
        for path in write_table(table, folder):
            print(path)
        print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    return 0
