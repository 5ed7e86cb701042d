"""``aen sweep``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from aen_lightning.cli.output import answer, remark
from aen_lightning.cli.summary import nearest_path
from aen_lightning.cli.training import AENCLI
from aen_lightning.training.module import SweepModule
from aen_lightning.training.pareto import sweep_table, write_table


def sweep(args: Sequence[str]) -> None:
    """Expand the lists in a config into a grid, train all of it on one stream, and write one table.

    The arguments are those of ``aen fit``; ``model.sae`` may hold lists, or be a list of dicts.
    """
    cli = SweepCLI(SweepModule, ["fit", *args])
    table = sweep_table(cli.trainer, cli.model, cli.datamodule)
    folder = Path(cli.trainer.log_dir or cli.trainer.default_root_dir)  # on every rank: the ranks agree on it
    if cli.trainer.is_global_zero:
        files = [str(path) for path in write_table(table, folder)]
        members = json.loads(table.to_json(orient="records"))
        answer(
            {"command": "sweep", "folder": str(folder), "files": files, "members": members},
            lambda: table.to_string(index=False, float_format=lambda value: f"{value:.4g}"),
        )
        for path in files:
            remark(f"wrote {nearest_path(path)}")
        remark(
            f"dictionaries in {nearest_path(folder / 'sae' / 'final')}; next: aen report {nearest_path(folder)}"
        )


class SweepCLI(AENCLI):
    """Refuses before training what cannot be compared after it, and says more than one SAE's result."""

    def after_fit(self) -> None:
        """Called by LightningCLI; the table comes after it."""

    def before_fit(self) -> None:
        """Called by LightningCLI."""
        if self.trainer.limit_val_batches == 0:
            raise ValueError(
                "a sweep compares its SAEs on the validation split: trainer.limit_val_batches must be above 0"
            )
