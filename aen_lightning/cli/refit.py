"""``aen refit``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from aen_lightning.cli.output import answer, remark
from aen_lightning.cli.summary import fit_result, nearest_path
from aen_lightning.cli.training import AENCLI, errors_of_use
from aen_lightning.runs.layout import REFIT_FILE
from aen_lightning.training.refit import RefitModule


class RefitCLI(AENCLI):
    """A refit has no preset: it takes what the dictionary is."""

    takes_presets = False


def refit(args: Sequence[str]) -> None:
    """Refit a dictionary; the arguments are those of ``aen fit``, with ``--model.dictionary``."""
    cli = RefitCLI(RefitModule, args, run=False)
    with errors_of_use(cli):
        before = _held_out(cli)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    ended = fit_result(cli.trainer)
    after = _held_out(cli)
    # on every rank, as the ranks agree on it
    path = Path(cli.trainer.log_dir or cli.trainer.default_root_dir) / REFIT_FILE
    if cli.trainer.is_global_zero and after:
        table = pd.DataFrame({"before": before, "after": after})
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, index_label="metric")
        answer(
            ended | {"command": "refit", "before": before, "metrics": after, "metrics_from": "validation"},
            lambda: table.to_string(float_format=lambda value: f"{value:.4g}"),
        )
        remark(f"wrote {nearest_path(path)}")
        if ended["dictionary"] is not None:
            folder = nearest_path(ended["dictionary"])
            remark(f"dictionary in {folder}; next: aen evaluate {folder}")


def _held_out(cli: AENCLI) -> dict[str, float]:
    """Metrics on the validation split; nothing if the data have none."""
    (values,) = cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False) or [{}]
    return {key.removeprefix("val/metrics/"): value for key, value in values.items()}
