"""One trained SAE of a report, and all that its run left about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from aen_lightning.report.naming import has_own_weights
from aen_lightning.runs.curves import METRICS, Curves, read_curves, read_sweep
from aen_lightning.runs.dictionary import Dictionary, dictionaries_in
from aen_lightning.runs.layout import FINAL_FOLDER, export_folder
from aen_lightning.runs.provenance import COEFFICIENTS, training_settings

NEVER_FIRED = -9.5
"""SAELens writes log10(density + 1e-10): below this lies only what never fired."""

_SOURCES = (
    ("test/metrics/", "test split"),
    ("val/metrics/", "validation, last"),
    ("metrics/", "last training batch"),
)


@dataclass
class TrainedSAE:
    """One SAE of a run, exported or not.

    Args:
        run: Name of its run in this report.
        name: Name inside the run: of a sweep's member; empty for the only SAE of a run.
        dictionary: What was exported of it; None if nothing was.
        curves: By log key (``losses/mse_loss``) the values by training step.
        metrics: Those of ``METRICS`` that are known, at the end of training.
        metrics_source: Where ``metrics`` are from, for people.
        settings: What it was trained with; the paper's lambdas where the run states the coefficients of
            SAELens.
        evaluation: JSON of ``aen evaluate``.
        diagnosis: JSON of ``aen diagnose``.
        family: ``AEN``, ``L1``, ``TopK``, ...; set by :func:`~aen_lightning.report.collect.collect`.
        label: Short name, unique in the report; set there, too.
    """

    run: str
    name: str
    dictionary: Dictionary | None
    curves: dict[str, pd.Series[float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    metrics_source: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    diagnosis: dict[str, Any] | None = None
    family: str = ""
    label: str = ""

    @property
    def folder(self) -> Path | None:
        """SAELens folder, if exported."""
        return None if self.dictionary is None else self.dictionary.path

    @property
    def d_sae(self) -> int | None:
        """Features, if exported."""
        return None if self.dictionary is None else self.dictionary.cfg["d_sae"]

    @property
    def training_architecture(self) -> str | None:
        """The architecture it was trained as, if exported."""
        return None if self.dictionary is None else self.dictionary.training_architecture

    def log_density(self) -> NDArray[np.float32] | None:
        """``log10`` of each feature's firing rate per token in the last window, (d_sae,), as stored."""
        return _array(None if self.dictionary is None else self.dictionary.log_sparsity())

    def l1_weights(self) -> NDArray[np.float32] | None:
        """Adaptive weights at the end, (d_sae,); None where all are 1 by design or none were saved."""
        if self.dictionary is None or not has_own_weights(self.settings):
            return None
        return _array(self.dictionary.l1_weights())

    def dead_pct(self) -> tuple[float, str] | None:
        """Percent of features that never fired, and on what; None if nothing tells."""
        if "dead_features_pct" in self.metrics:
            return self.metrics["dead_features_pct"], self.metrics_source
        evaluated = None if self.evaluation is None else self.evaluation["features"]["dead_pct"]
        if evaluated is not None:
            return float(evaluated), "aen evaluate"
        window = self.curves.get("sparsity/dead_features_window_pct")
        if window is not None:
            return float(window.iloc[-1]), "last full window of training"
        if (density := self.log_density()) is not None:
            return 100 * float(
                (density <= NEVER_FIRED).mean()
            ), "last window of training (sparsity.safetensors)"
        return None


def _array(tensor: torch.Tensor | None) -> NDArray[np.float32] | None:
    return None if tensor is None else tensor.float().numpy()


def read_bare(dictionary: Dictionary, run: str) -> TrainedSAE:
    """A dictionary without its run."""
    return TrainedSAE(run, "", dictionary, settings=training_settings(dictionary))


def read_run(folder: Path, run: str, notes: list[str]) -> list[TrainedSAE]:
    """All SAEs of a run folder, in the order it trained them; ``notes`` gets what was not found."""
    exported = _exported(folder, run, notes)
    curves = read_curves(folder)
    if curves is None:
        notes.append(
            f"{run} has no metrics.csv, so no curves: train with Lightning's CSVLogger to have them."
        )
        curves = Curves({})
    sweep = read_sweep(folder)
    rows = {} if sweep is None else {str(name): row.dropna().to_dict() for name, row in sweep.iterrows()}
    found = []
    for name in rows or sorted({*exported, *curves.names}) or [""]:
        sae = TrainedSAE(run, name, exported.get(name), curves.of(name))
        if sae.dictionary is not None:
            sae.settings = training_settings(sae.dictionary)
        if name in rows:
            _add_sweep_row(sae, rows[name])
        else:
            sae.metrics, sae.metrics_source = _last_metrics(curves.last(name))
        found.append(sae)
    return found


def _exported(folder: Path, run: str, notes: list[str]) -> dict[str, Dictionary]:
    """Dictionaries by name: of ``sae/final``, or of the last ``sae/step_N`` of a run that has not ended."""
    root = export_folder(folder)
    found = [] if root is None else dictionaries_in(root)
    if root is None or not found:
        notes.append(f"{run} exported no dictionary (no sae/final): only its curves are shown.")
    elif root.name != FINAL_FOLDER:
        notes.append(f"{run} has no sae/final (has it ended?): its dictionaries are those of {root.name}.")
    return {dictionary.name: dictionary for dictionary in found}


def _add_sweep_row(sae: TrainedSAE, row: dict[Any, Any]) -> None:
    sae.metrics = {metric: float(row[metric]) for metric in METRICS if metric in row}
    sae.metrics_source = "validation, at the end (sweep.csv)"
    known = {"architecture", "n_training_samples", *METRICS}
    known |= {ours for ours, paper in COEFFICIENTS.items() if paper in sae.settings}
    sae.settings |= {str(k): v for k, v in row.items() if k not in known and k not in sae.settings}


def _last_metrics(last: dict[str, float]) -> tuple[dict[str, float], str]:
    for prefix, source in _SOURCES:
        if values := {metric: last[prefix + metric] for metric in METRICS if prefix + metric in last}:
            return values, source
    return {}, "none"
