"""The tables of a run: ``metrics.csv`` of Lightning's CSVLogger, and the comparison of a sweep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from aen_lightning.files.checked import FOREIGN, Count, Foreign, Number, Size, Text, Word, check, shortened
from aen_lightning.runs.layout import METRICS_FILE, SWEEP_FILE
from aen_lightning.spelling import printable

METRICS = ("l0", "explained_variance", "mse", "shrinkage_ratio", "dead_features_pct")
"""What every SAE is measured by on held-out data: keys behind ``val/metrics/``, columns of ``sweep.csv``."""

_SPLITS = ("val", "test")
_TRAINING = ("details", "losses", "metrics", "sparsity", "weights")
_HELD_OUT = ("metrics", "downstream", "raw", "features", "ground_truth")  # behind the split
_N_SAMPLES = "details/n_training_samples"  # logged with every training row, and with no other


_MAX_STEP = 2**53  # beyond it a float64 no longer counts


class _SweepRow(Foreign):
    """A row of ``sweep.csv``; what varies in the sweep stands in further columns."""

    model_config = FOREIGN | {"allow_inf_nan": True}  # a member may have diverged

    name: Word
    architecture: Text | None = None
    l0: Number | None = None
    explained_variance: Number | None = None
    mse: Number | None = None
    shrinkage_ratio: Number | None = None
    dead_features_pct: Number | None = None
    d_in: Size | None = None
    d_sae: Size | None = None
    n_training_samples: Count | None = None


@dataclass(frozen=True)
class Curves:
    """What a run logged.

    Args:
        by_name: For each SAE of the run, by its name, the values by log key without that name
            (``metrics/l0``, ``val/metrics/l0``), each indexed by the training step, without gaps. The empty
            name has what the run logged for all, or for its only SAE.
    """

    by_name: dict[str, dict[str, pd.Series[float]]]

    @property
    def names(self) -> list[str]:
        """Names of the SAEs that have values of their own, sorted; of the only one of a run none."""
        return sorted(name for name in self.by_name if name)

    def of(self, name: str = "") -> dict[str, pd.Series[float]]:
        """The curves of one SAE by log key, with those of the whole run."""
        return {**self.by_name.get("", {}), **self.by_name.get(name, {})}

    def last(self, name: str = "") -> dict[str, float]:
        """The last value of each curve of one SAE, by log key."""
        return {key: float(series.iloc[-1]) for key, series in self.of(name).items()}

    def held_out(self, name: str = "") -> dict[str, float]:
        """The last held-out metrics: ``l0`` of the validation split, ``test/l0`` of the test split."""
        found = {}
        for key, value in self.last(name).items():
            split, _, rest = key.partition("/")
            if split in _SPLITS:
                metric = rest.removeprefix("metrics/")
                found[metric if split == "val" else f"{split}/{metric}"] = value
        return found

    def in_training(self, name: str = "") -> dict[str, float]:
        """The last losses, metrics and sparsity of training batches, by log key."""
        kept = ("losses/", "metrics/", "sparsity/")
        return {key: value for key, value in self.last(name).items() if key.startswith(kept)}

    @property
    def n_training_samples(self) -> int | None:
        """Activations trained on, as logged last; None if that was not logged."""
        value = self.last().get(_N_SAMPLES)
        return None if value is None or not math.isfinite(value) else int(value)

    @property
    def n_training_steps(self) -> int | None:
        """Optimizer steps, as logged last; None if that was not logged."""
        # a validation after the fit is logged one step beyond the last
        samples = self.of().get(_N_SAMPLES)
        return None if samples is None else int(samples.index[-1]) + 1


def read_curves(run: Path) -> Curves | None:
    """``metrics.csv`` of a run; None if it has none.

    Where a step was logged twice, as by a run that was resumed, the later row counts.

    Raises:
        ValueError: If it is not what Lightning's CSVLogger writes, or a step is none.
    """
    path = run / METRICS_FILE
    if not path.is_file():
        return None
    table = _read_csv(path, "step")
    table["step"] = steps = pd.to_numeric(table["step"], errors="coerce")
    if not (wrong := steps[steps.notna() & ~steps.between(0, _MAX_STEP)]).empty:
        raise ValueError(
            f"{path}: expected a step from 0 on in row {wrong.index[0] + 2}, got {wrong.iloc[0]:g}"
        )
    # a row holds the values of training or of validation: the other fields are empty
    table = table.groupby("step", sort=True).last()
    by_name: dict[str, dict[str, pd.Series[float]]] = {}
    for column in map(str, table.columns):
        name, key = _name_and_key(column)
        values: pd.Series[float] = pd.to_numeric(table[column].dropna(), errors="coerce")
        if key and len(values):
            by_name.setdefault(name, {})[key] = values
    return Curves(by_name)


def read_sweep(run: Path) -> pd.DataFrame | None:
    """``sweep.csv`` of a run, a row for each of its SAEs, indexed by their names; None if it is no sweep.

    Raises:
        ValueError: If it has no column ``name``, names two SAEs alike, or a metric is no number; it names row
            and column.
    """
    path = run / SWEEP_FILE
    if not path.is_file():
        return None
    names = _read_csv(path, "name")["name"]
    table = pd.read_csv(path, index_col=False).drop(columns="name")
    for number, row in enumerate(table.astype(object).to_dict("records")):
        content = {str(key): value for key, value in row.items() if not pd.isna(value)}
        check(_SweepRow, {**content, "name": names[number]}, f"{path}, row {number + 2}")
    if not (twice := names[names.duplicated()]).empty:
        raise ValueError(f"{path} has two rows named {shortened(twice.iloc[0])}")
    return table.set_axis(names, axis="index")


def _read_csv(path: Path, column: str) -> pd.DataFrame:
    """A table of text; an empty field is missing, and nothing else is."""
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""], "index_col": False}
    try:
        table = pd.read_csv(path, **options)
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV file: {printable(str(error).strip())}") from error
    except pd.errors.EmptyDataError:
        table = pd.DataFrame()
    if column not in table:
        raise ValueError(f"{path} has no column {column!r}: it is not what a run writes")
    return table


def _name_and_key(column: str) -> tuple[str, str]:
    """The SAE's name and the log key in a column; an empty key if it is no value of an SAE.

    ``NAME/metrics/l0``, ``NAME/val/metrics/l0`` and ``test/NAME/downstream/kl`` have a name, which has no
    slash.
    """
    first, _, rest = column.partition("/")
    second, _, beyond = rest.partition("/")
    if first in _TRAINING or (first in _SPLITS and second in _HELD_OUT):
        return "", column
    if first in _SPLITS and beyond.partition("/")[0] in _HELD_OUT:
        return second, f"{first}/{beyond}"
    return (first, rest) if second in (*_TRAINING, *_SPLITS) else ("", "")
