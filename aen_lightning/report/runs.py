"""One run folder: curves, settings, exported dictionaries and adaptive weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sae_lens.constants import SPARSITY_FILENAME
from safetensors import safe_open
from safetensors.torch import load_file

from aen_lightning.report.naming import has_own_weights

METRICS = ("l0", "explained_variance", "mse", "shrinkage_ratio", "dead_features_pct")
_ROOTS = (
    "details",
    "losses",
    "metrics",
    "sparsity",
    "weights",
    "val",
    "test",
)  # of log keys; members have no slash in names
_COEFFICIENTS = (("l1_coefficient", "lambda_1"), ("l2_coefficient", "lambda_2"))  # SAELens's form, the paper's
_WEIGHTS = "sae_weights.safetensors"


@dataclass
class Dictionary:
    """One trained dictionary and all that its run left about it.

    Args:
        run: Name of its run in this report.
        name: Name inside the run: of a sweep's member; empty for the only SAE of a run.
        folder: SAELens folder, if exported.
        cfg: Its ``cfg.json``; empty if not exported.
        curves: Indexed by training step, one column a logged key (``losses/mse_loss``), without the member's name.
        metrics: Those of ``METRICS`` that are known, at the end of training.
        metrics_source: Where ``metrics`` are from, for people.
        settings: What it was trained with; the paper's lambdas where the run states the coefficients of SAELens.
        log_density: ``log10`` of each feature's firing rate per token in the last window, (d_sae,).
        l1_weights: Adaptive weights in the last checkpoint, (d_sae,); None where all are 1 by design or none was found.
        evaluation: JSON of ``aen evaluate``.
        diagnosis: JSON of ``aen diagnose``.
        family: ``AEN``, ``L1``, ``TopK``, ...; set by :func:`collect`.
        label: Short name, unique in the report; set by :func:`collect`.
    """

    run: str
    name: str
    folder: Path | None
    cfg: dict[str, Any]
    curves: pd.DataFrame
    metrics: dict[str, float] = field(default_factory=dict)
    metrics_source: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)
    log_density: NDArray[np.float32] | None = None
    l1_weights: NDArray[np.float32] | None = None
    evaluation: dict[str, Any] | None = None
    diagnosis: dict[str, Any] | None = None
    family: str = ""
    label: str = ""

    @property
    def d_sae(self) -> int | None:
        """Features."""
        return self.cfg.get("d_sae")

    def weights(self) -> torch.Tensor:
        """``W_dec``, shape (d_sae, d_in), as stored; read from disk at each call.

        Raises:
            FileNotFoundError: If the run exported nothing.
        """
        if self.folder is None:
            raise FileNotFoundError(f"{self.label} was not exported: there is no dictionary to read")
        with safe_open(self.folder / _WEIGHTS, framework="pt") as f:
            tensor: torch.Tensor = f.get_tensor("W_dec")
        return tensor


def read_bare(folder: Path, run: str) -> Dictionary:
    """A dictionary without its run."""
    d = Dictionary(run, "", folder, read_json(folder / "cfg.json"), pd.DataFrame())
    _read_export(d)
    return d


def read_run(folder: Path, run: str, notes: list[str]) -> list[Dictionary]:
    """All SAEs of a run folder, in the order it trained them; ``notes`` gets what was not found."""
    exported = _exported(folder, run, notes)
    curves = _read_curves(folder, run, notes)
    table = pd.read_csv(folder / "sweep.csv") if (folder / "sweep.csv").is_file() else None
    names = list(table["name"].astype(str)) if table is not None else sorted({*exported, *(n for n in curves if n)})
    if not names:
        names = [""]
    found = []
    for name in names:
        own, shared = curves.get(name, pd.DataFrame()), curves.get("", pd.DataFrame())
        both = own if name == "" else own.join(shared, how="outer") if len(own) else own
        path = exported.get(name)
        d = Dictionary(run, name, path, read_json(path / "cfg.json") if path else {}, both)
        if path:
            _read_export(d)
        if table is not None:
            row = table[table["name"].astype(str) == name].iloc[0].dropna().to_dict()
            d.metrics = {m: float(row[m]) for m in METRICS if m in row}
            d.metrics_source = "validation, at the end (sweep.csv)"
            known = {"name", "architecture", "n_training_samples", *METRICS}
            known |= {ours for ours, paper in _COEFFICIENTS if paper in d.settings}
            d.settings |= {str(k): v for k, v in row.items() if k not in known and k not in d.settings}
        else:
            d.metrics, d.metrics_source = _last_metrics(d)
        found.append(d)
    _read_checkpoint(folder, found, run, notes)
    return found


def _exported(folder: Path, run: str, notes: list[str]) -> dict[str, Path]:
    """Dictionaries by name: of ``sae/final``, or of the last ``sae/step_N`` of a run that has not ended."""
    root = folder / "sae" / "final"
    if not root.is_dir():
        steps = [p for p in (folder / "sae").glob("step_*") if p.name[5:].isdigit()]
        if not steps:
            notes.append(f"{run} exported no dictionary (no sae/final): only its curves are shown.")
            return {}
        root = max(steps, key=lambda p: int(p.name[5:]))
        notes.append(f"{run} has no sae/final (has it ended?): its dictionaries are those of {root.name}.")
    if (root / "cfg.json").is_file():
        return {"": root}
    return {p.parent.relative_to(root).as_posix(): p.parent for p in sorted(root.glob("**/cfg.json"))}


def _read_curves(folder: Path, run: str, notes: list[str]) -> dict[str, pd.DataFrame]:
    path = folder / "metrics.csv"
    if not path.is_file():
        notes.append(f"{run} has no metrics.csv, so no curves: train with Lightning's CSVLogger to have them.")
        return {}
    table = pd.read_csv(path)
    if "step" not in table:
        raise ValueError(f"{path} has no column 'step': it is not what Lightning's CSVLogger writes")
    # one row a step: validation is a row of its own, and a resumed run may log a step twice
    table = table.groupby("step", sort=True).last()
    columns: dict[str, dict[str, pd.Series[Any]]] = {}
    for column in table.columns:
        first, _, rest = str(column).partition("/")
        name, key = ("", str(column)) if first in _ROOTS else (first, rest)
        if key.split("/")[0] in _ROOTS:
            columns.setdefault(name, {})[key] = pd.to_numeric(table[column], errors="coerce")
    return {name: pd.concat(series, axis=1) for name, series in columns.items()}


def _last_metrics(d: Dictionary) -> tuple[dict[str, float], str]:
    sources = (
        ("test/metrics/", "test split"),
        ("val/metrics/", "validation, last"),
        ("metrics/", "last training batch"),
    )
    for prefix, source in sources:
        found = {m: d.curves[prefix + m].dropna() for m in METRICS if prefix + m in d.curves}
        if values := {m: float(s.iloc[-1]) for m, s in found.items() if len(s)}:
            return values, source
    return {}, "none"


def _read_export(d: Dictionary) -> None:
    """Density and settings that lie beside the dictionary."""
    assert d.folder is not None
    if (d.folder / SPARSITY_FILENAME).is_file():
        d.log_density = load_file(d.folder / SPARSITY_FILENAME)["sparsity"].float().numpy()
    metadata = d.cfg.get("metadata") or {}
    details = dict(metadata.get("training_architecture_details") or {})
    d.settings = {"d_in": d.cfg.get("d_in"), "d_sae": d.cfg.get("d_sae")}
    if metadata.get("training_architecture", d.cfg.get("architecture")) == "aen":
        for ours, paper in _COEFFICIENTS:
            if details.get(ours) is not None:
                d.settings[paper] = float(f"{details.pop(ours) / d.cfg['d_in']:.6g}")
    d.settings |= details
    if "k" in d.cfg:
        d.settings.setdefault("k", d.cfg["k"])
    with safe_open(d.folder / _WEIGHTS, framework="pt") as f:
        if "l1_weights" in f.keys():  # noqa: SIM118  # safe_open is no dict
            d.l1_weights = f.get_tensor("l1_weights").float().numpy()


def _read_checkpoint(folder: Path, dictionaries: list[Dictionary], run: str, notes: list[str]) -> None:
    """Adaptive weights, which are training state and so in Lightning's checkpoint only."""
    wanted = [d for d in dictionaries if d.l1_weights is None and _is_adaptive(d)]
    if not wanted:
        return
    files = list((folder / "checkpoints").glob("*.ckpt"))
    # a sharded strategy writes folders
    if not (files := [f for f in files if f.is_file()]):
        notes.append(f"{run} has no checkpoint file, and adaptive weights are nowhere else: they are not shown.")
        return
    newest = max(files, key=lambda f: (f.stat().st_mtime, f.name == "last.ckpt"))
    state = torch.load(newest, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    for i, d in enumerate(dictionaries):
        weights = state.get(f"tracked.{i}.sae.l1_weights")
        if any(d is w for w in wanted) and weights is None:
            notes.append(f"{newest} has no adaptive weights of {d.name or run}: they are not shown.")
        elif any(d is w for w in wanted):
            if d.d_sae is not None and len(weights) != d.d_sae:
                raise ValueError(
                    f"{newest} has {len(weights)} features for {d.name or run}, and its cfg.json says {d.d_sae}"
                )
            d.l1_weights = weights.float().numpy()


def _is_adaptive(d: Dictionary) -> bool:
    if "metrics/l1_weight_mean" not in d.curves:
        return False
    return has_own_weights(d.settings)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an error names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not JSON: {e}") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content
