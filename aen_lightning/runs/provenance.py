"""Where a dictionary comes from: what its run and this process can tell, without secrets or local paths."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aen_lightning.files.checked import read_yaml
from aen_lightning.files.redaction import without_secrets
from aen_lightning.runs.curves import read_curves
from aen_lightning.runs.dictionary import Dictionary
from aen_lightning.runs.layout import CONFIG_FILE
from aen_lightning.saes.aen_config import ARCHITECTURE

COEFFICIENTS = {"l1_coefficient": "lambda_1", "l2_coefficient": "lambda_2"}
"""SAELens's names of an AEN-SAE's coefficients, which sum over ``d_in``, and the paper's, which average."""

_PACKAGES = ("aen-lightning", "sae-lens", "torch", "lightning", "transformers", "datasets", "huggingface-hub")
_TRAINER_KEYS = (
    "max_steps",
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "accumulate_grad_batches",
    "strategy",
    "devices",
    "num_nodes",
)


def collect_provenance(dictionary: Dictionary) -> dict[str, Any]:
    """What is known of the training, in plain JSON types; what is not known is left out.

    Returns:
        ``evaluation`` (held-out metrics by name), ``training_metrics`` (the last logged),
        ``n_training_samples``, ``n_training_steps``, ``seed``, ``recipe`` (model, data and trainer sections
        of ``config.yaml``), ``environment_at_publishing`` (package versions), ``git_commit_at_publishing``
        (of the working directory, with ``-dirty`` if it had changes).

    Raises:
        ValueError: If the run's ``metrics.csv`` is not one.
    """
    found: dict[str, Any] = dict(dictionary.metadata.get("provenance") or {})
    if dictionary.run is not None:
        found |= _recipe(dictionary.run)
        if (curves := read_curves(dictionary.run)) is not None:
            found["evaluation"] = _finite(curves.held_out(dictionary.name))
            found["training_metrics"] = _finite(curves.in_training(dictionary.name))
            found["n_training_samples"] = curves.n_training_samples
            found["n_training_steps"] = curves.n_training_steps
    found["environment_at_publishing"] = versions()
    found["git_commit_at_publishing"] = git_commit()
    return dict(scrub({key: value for key, value in found.items() if value not in (None, {}, [])}))


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    """Without what JSON has no word for."""
    return {key: value for key, value in values.items() if math.isfinite(value)}


def training_settings(dictionary: Dictionary) -> dict[str, Any]:
    """What a dictionary says it was trained with: sizes, and the fields of its training config.

    Where an AEN-SAE has SAELens's coefficients, ``lambda_1`` and ``lambda_2`` of the paper stand in their
    place.
    """
    cfg, details = dictionary.cfg, dict(dictionary.metadata.get("training_architecture_details") or {})
    settings: dict[str, Any] = {"d_in": cfg["d_in"], "d_sae": cfg["d_sae"]}
    if dictionary.training_architecture == ARCHITECTURE:
        for ours, paper in COEFFICIENTS.items():
            if isinstance(details.get(ours), int | float):
                settings[paper] = float(f"{details.pop(ours) / cfg['d_in']:.6g}")
    settings |= details
    if "k" in cfg:
        settings.setdefault("k", cfg["k"])
    return settings


def versions() -> dict[str, str]:
    """Versions of the packages that matter, as installed here."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that was never installed
            continue
    return found


def git_commit(folder: Path | None = None) -> str | None:
    """Commit of the repository that holds ``folder`` (the working directory), or None outside of any."""
    where = ["git", "-C", str(folder or Path.cwd())]
    try:
        head = subprocess.run(
            [*where, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        changes = subprocess.run(
            [*where, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


def scrub(value: Any) -> Any:
    """A copy without secrets (:func:`~aen_lightning.files.redaction.without_secrets`), and with local paths cut to
    their last part: an absolute one, or one that leads out of the working directory."""
    return _without_local_paths(without_secrets(value))


def _without_local_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_local_paths(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_local_paths(v) for v in value]
    if isinstance(value, Path):
        return _without_local_paths(str(value))
    if isinstance(value, str) and is_local_path(value):
        return value.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    return value


def is_local_path(value: str) -> bool:
    """Whether a name of a model or a data set can only mean this machine."""
    return bool(re.match(r"(/|~|\.\.?(/|$)|[A-Za-z]:[\\/]|file:)", value)) and "\n" not in value


def _as_json(value: Any) -> Any:
    """What YAML has and JSON has not (dates, a nan) as text."""
    if isinstance(value, dict):
        return {str(key): _as_json(v) for key, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_as_json(v) for v in value]
    plain = isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else str(value)


def _recipe(run: Path) -> dict[str, Any]:
    config_file = run / CONFIG_FILE
    if not config_file.is_file():
        return {}
    try:
        config = read_yaml(config_file)
    except ValueError:  # a hand-edited or foreign file: the dictionary is as good without it
        return {}
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    recipe = {
        "seed_everything": config.get("seed_everything"),
        "model": config.get("model"),
        "data": config.get("data"),
        "trainer": {key: trainer[key] for key in _TRAINER_KEYS if trainer.get(key) is not None},
    }
    seed = config.get("seed_everything")
    return {
        "recipe": {k: _as_json(v) for k, v in recipe.items() if v not in (None, {}, [])},
        "seed": seed if isinstance(seed, int) and abs(seed) < 2**63 else None,
    }
