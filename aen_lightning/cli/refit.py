"""``aen refit``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from aen_lightning.cli.training import AENCLI
from aen_lightning.runs.layout import REFIT_FILE
from aen_lightning.training.refit import RefitModule


def refit(args: Sequence[str]) -> None:
    """Refit a dictionary; the arguments are those of ``aen fit``, with ``--model.dictionary``."""
    cli = RefitCLI(RefitModule, ["fit", *args], command="refit")
    after = _held_out(cli)
    # on every rank, as the ranks agree on it
    path = Path(cli.trainer.log_dir or cli.trainer.default_root_dir) / REFIT_FILE
    if cli.trainer.is_global_zero and after:
        table = pd.DataFrame({"before": cli.before, "after": after})
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, index_label="metric")
        print(f"{table.to_string(float_format=lambda value: f'{value:.4g}')}\n{path}")


class RefitCLI(AENCLI):
    """Measures the dictionary as it is, before it is refitted or the refit goes on."""

    before: dict[str, float]

    def before_fit(self) -> None:
        """Called by LightningCLI."""
        self.before = _held_out(self)


def _held_out(cli: AENCLI) -> dict[str, float]:
    """Metrics on the validation split; nothing if the data have none."""
    (values,) = cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False) or [{}]
    return {key.removeprefix("val/metrics/"): value for key, value in values.items()}
