"""What a run says when it has ended: what came out, where it lies, and what to do next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from aen_lightning.callbacks import ExportSAE
from aen_lightning.cli.output import answer
from aen_lightning.runs.curves import METRICS
from aen_lightning.runs.layout import CONFIG_FILE, METRICS_FILE
from aen_lightning.shards.manifest import Manifest

_TRAINING_KEYS = {"l0": "l0", "explained_variance": "ev", "dead_features_pct": "dead%"}  # of the progress bar


def say_result(trainer: pl.Trainer) -> None:
    """Answer ``aen fit``: on rank 0, of the SAE whose run has just ended. To be called on every rank."""
    result = fit_result(trainer)
    if trainer.is_global_zero:
        answer(result, lambda: fit_text(result))


def fit_result(trainer: pl.Trainer) -> dict[str, Any]:
    """What ``aen fit --json`` prints.

    ``command``, ``steps``, ``metrics`` (``l0``, ``explained_variance``, ``dead_features_pct``, ... as far as
    they are known), ``metrics_from`` (``validation``, or ``training`` for the last logged batch), ``folder``,
    ``dictionary`` and ``checkpoint``: paths, or null. To be called on every rank: Lightning's ``log_dir`` is a
    collective.
    """
    values = {key: float(value) for key, value in trainer.callback_metrics.items()}
    found = {m: values[f"val/metrics/{m}"] for m in METRICS if f"val/metrics/{m}" in values}
    training = {m: values[key] for m, key in _TRAINING_KEYS.items() if key in values}
    export = next((c for c in trainer.callbacks if isinstance(c, ExportSAE)), None)  # type: ignore[attr-defined]
    saver: Any = trainer.checkpoint_callback
    checkpoint = getattr(saver, "last_model_path", "") or getattr(saver, "best_model_path", "")
    return {
        "command": "fit",
        "steps": trainer.global_step,
        "metrics": found or training,
        "metrics_from": "validation" if found else "training",
        "folder": None if trainer.log_dir is None else str(trainer.log_dir),
        "dictionary": None if export is None or export.last_path is None else str(export.last_path),
        "checkpoint": checkpoint or None,
    }


def fit_text(result: dict[str, Any]) -> str:
    """The same for people."""
    m, folder, dictionary = result["metrics"], result["folder"], result["dictionary"]
    names = (("l0", "L0 {:.4g}"), ("explained_variance", "explained variance {:.4g}"),
             ("dead_features_pct", "dead features {:.4g} %"))  # fmt: skip
    said = ", ".join(text.format(m[name]) for name, text in names if name in m) or "nothing was measured"
    lines = [f"{result['steps']:,} steps: {said} ({result['metrics_from']})"]
    if folder is not None:
        there = [
            name for name in (METRICS_FILE, CONFIG_FILE, "checkpoints") if (Path(folder) / name).exists()
        ]
        lines.append(f"run         {nearest_path(folder)} ({', '.join(there)})")
    if dictionary is not None:
        lines.append(f"dictionary  {nearest_path(dictionary)}")
        lines.append(f"next        aen evaluate {nearest_path(dictionary)}")
        if folder is not None:
            lines.append(f"            aen report {nearest_path(folder)}")
    return "\n".join(lines)


def say_metrics(trainer: pl.Trainer, command: str) -> None:
    """Answer ``aen validate`` and ``aen test``: on rank 0, every metric of the split."""
    if not trainer.is_global_zero:
        return
    metrics = {key.partition("/metrics/")[2] or key: float(v) for key, v in trainer.callback_metrics.items()}
    width = max(map(len, metrics), default=0)
    answer(
        {"command": command, "metrics": metrics},
        lambda: "\n".join(f"{name:<{width}}  {value:.4g}" for name, value in metrics.items()),
    )


def harvest_result(manifest: Manifest, path: str | Path) -> dict[str, Any]:
    """What ``aen harvest --json`` prints: ``command``, ``path``, ``n_tokens``, ``n_shards``, ``d_in`` by hook,
    ``dtype`` and ``n_bytes``.
    """
    return {
        "command": "harvest",
        "path": str(path),
        "n_tokens": manifest.n_tokens,
        "n_shards": len(manifest.shards),
        "n_bytes": sum(shard.n_bytes for shard in manifest.shards),
    }


def harvest_text(result: dict[str, Any]) -> str:
    """The same for people."""
    path = nearest_path(result["path"])
    return (
        f"{result['n_tokens']:,} tokens in {result['n_shards']} shards, {result['n_bytes'] / 2**30:.3f} GiB\n"
        f"activations  {path}\n"
        f"next         aen shards verify {path}\n"
        f"             aen fit --data ActivationsDataModule --data.path {path} ..."
    )


def nearest_path(path: str | Path) -> str:
    """The path as short as it can be typed here."""
    absolute = Path(path).resolve()
    return os.path.relpath(absolute) if absolute.is_relative_to(Path.cwd()) else str(path)
