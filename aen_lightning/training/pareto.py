"""The table that compares the SAEs of a sweep, and its Pareto fronts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd

from aen_lightning.files import replacing, write_text
from aen_lightning.runs.curves import METRICS
from aen_lightning.runs.layout import PARETO_FILE, SWEEP_FILE, SWEEP_PARQUET_FILE
from aen_lightning.training.module import SweepModule


def sweep_table(trainer: pl.Trainer, module: SweepModule, datamodule: pl.LightningDataModule) -> pd.DataFrame:
    """One row per SAE: its name, architecture, what varies, and the metrics on the whole validation split.

    Raises:
        ValueError: If the data have no validation split.
    """
    (values,) = trainer.validate(module, datamodule=datamodule, verbose=False) or [{}]
    if not values:
        raise ValueError(
            f"{type(datamodule).__name__} has no validation split to compare the sweep on: hold some "
            "documents or rows out"
        )
    rows = []
    for member, tracked in zip(module.members, module.tracked, strict=True):
        row: dict[str, Any] = {
            "name": member.name,
            "architecture": tracked.sae.cfg.architecture(),
            **member.varied,
        }
        row |= {metric: values[f"{member.name}/val/metrics/{metric}"] for metric in METRICS}
        row |= {"d_in": tracked.sae.cfg.d_in, "d_sae": tracked.sae.cfg.d_sae, "seed": member.seed}
        row |= {"n_training_samples": module.n_training_samples}
        rows.append(row)
    return pd.DataFrame(rows)


def write_table(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write ``sweep.csv``, ``sweep.parquet`` and ``pareto.json`` and return their paths.

    ``pareto.json`` has for each pair of metrics (``explained_variance`` and ``dead_features_pct`` against
    ``l0``) and each architecture the points that no other of that architecture beats in both, sorted by L0,
    with their names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    csv, parquet, pareto = folder / SWEEP_FILE, folder / SWEEP_PARQUET_FILE, folder / PARETO_FILE
    with replacing(csv) as temporary:
        table.to_csv(temporary, index=False)
    # a column may hold numbers for one architecture and strings for another, which parquet cannot
    mixed = [
        column for column in table if table[column].map(type).nunique() > 1 and table[column].dtype == object
    ]
    with replacing(parquet) as temporary:
        table.astype(dict.fromkeys(mixed, str)).to_parquet(temporary, index=False)
    fronts = {
        "explained_variance": pareto_fronts(table, "explained_variance", higher_is_better=True),
        "dead_features_pct": pareto_fronts(table, "dead_features_pct", higher_is_better=False),
    }
    write_text(pareto, json.dumps(fronts, indent=1) + "\n")
    return [csv, parquet, pareto]


def pareto_fronts(
    table: pd.DataFrame, metric: str, *, higher_is_better: bool
) -> dict[str, list[dict[str, Any]]]:
    """Per architecture, the rows with the best ``metric`` among those with at most their L0.

    Args:
        table: With columns ``name``, ``architecture``, ``l0`` and ``metric``.
        metric: Column to compare.
        higher_is_better: Its good direction.

    Returns:
        Lists of ``{"name", "l0", metric}``, L0 ascending.
    """
    fronts: dict[str, list[dict[str, Any]]] = {}
    for architecture, group in table.groupby("architecture", sort=True):
        best: float | None = None
        front = []
        ordered = group.sort_values(["l0", metric], ascending=[True, not higher_is_better])
        for row in ordered[["name", "l0", metric]].to_dict("records"):
            if best is None or (row[metric] > best if higher_is_better else row[metric] < best):
                best = float(row[metric])
                front.append({"name": str(row["name"]), "l0": float(row["l0"]), metric: best})
        fronts[str(architecture)] = front
    return fronts
