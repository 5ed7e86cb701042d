"""What is published of a local folder: a dictionary for raw activations, without secrets or local paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from sae_lens import TrainingSAE
from sae_lens.constants import (
    ACTIVATION_WHITENING_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEConfig

from aen_lightning.files import write_json
from aen_lightning.runs.dictionary import Dictionary, read_activation_scale, read_cfg
from aen_lightning.runs.provenance import collect_provenance, scrub
from aen_lightning.runs.weights import FOREIGN_ERRORS, check_weights
from aen_lightning.saes.aen_config import ARCHITECTURE
from aen_lightning.spelling import printable

PublishedArchitecture = Literal["standard", "aen"]


def stage(
    dictionary: Dictionary,
    folder: Path,
    *,
    architecture: PublishedArchitecture = "standard",
    model_name: str | None = None,
    dataset: str | None = None,
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Prepare a dictionary for publishing.

    Args:
        dictionary: A SAELens folder: exported for inference, or saved by a trainer (then exported into
            ``folder``).
        folder: An empty folder for what must be rewritten; weights that can stay as they are are not copied.
        architecture: What dictionaries trained as ``aen`` call themselves.
        model_name: Overrides the metadata's.
        dataset: Overrides the metadata's.

    Returns:
        The config to publish, and each file's name with where it is.

    Raises:
        ValueError: For a folder whose input scaling is lost, whose weights do not fit its config, or in which
            a number is not finite.
    """
    path, cfg = dictionary.path, dict(dictionary.cfg)
    if _saved_for_training(cfg):
        path = _export(dictionary, folder / "exported")
        cfg = read_cfg(path)
    if cfg.get("normalize_activations") in ("expected_average_only_in", "covariance_whitening"):
        raise ValueError(
            f"{dictionary.path} expects activations scaled by {cfg['normalize_activations']!r} and does not "
            f"hold the factor, "
            "which SAELens's trainer folds in when it ends: publish the folder it wrote at the end"
        )
    metadata = dict(cfg.get("metadata") or {})
    if dictionary.training_architecture == ARCHITECTURE and cfg.get("architecture") in (
        "standard",
        ARCHITECTURE,
    ):
        # both are a ReLU SAE with the same four weights: the name is all that differs
        cfg["architecture"] = architecture
        metadata["training_architecture"] = ARCHITECTURE
    if model_name is not None:
        metadata["model_name"] = model_name
    if dataset is not None:
        metadata["dataset_path"] = dataset
    cfg["metadata"] = {**scrub(metadata), "provenance": collect_provenance(dictionary)}
    cfg["device"] = "cpu"
    check_weights(cfg, path / SAE_WEIGHTS_FILENAME, where=dictionary.path / SAE_CFG_FILENAME)
    try:
        cfg_file = write_json(folder / SAE_CFG_FILENAME, cfg)
    except ValueError as error:
        raise ValueError(
            f"{dictionary.path / SAE_CFG_FILENAME} holds a nan or an infinity, which JSON has not: take it out"
        ) from error
    files = {SAE_CFG_FILENAME: cfg_file, SAE_WEIGHTS_FILENAME: path / SAE_WEIGHTS_FILENAME}
    if (dictionary.path / SPARSITY_FILENAME).is_file():
        files[SPARSITY_FILENAME] = dictionary.path / SPARSITY_FILENAME
    return cfg, files


def _saved_for_training(cfg: dict[str, Any]) -> bool:
    """Whether the config has settings that only a training config of its architecture knows."""
    name = cfg.get("architecture", "standard")
    if name not in SAE_TRAINING_CLASS_REGISTRY:
        return False
    inference: type[SAEConfig] | None = SAE_CLASS_REGISTRY[name][1] if name in SAE_CLASS_REGISTRY else None
    own = set(SAE_TRAINING_CLASS_REGISTRY[name][1].__dataclass_fields__)
    known = set(inference.__dataclass_fields__) if inference is not None else set()
    return bool((own - known) & cfg.keys())


def _export(dictionary: Dictionary, folder: Path) -> Path:
    """Export what a trainer saved, with the average scale folded in if SAELens left it beside the weights."""
    try:
        sae: TrainingSAE[Any] = TrainingSAE.load_from_disk(dictionary.path)
    except FOREIGN_ERRORS as error:
        raise ValueError(f"{dictionary.path} holds no training SAE: {printable(str(error))}") from error
    scale = read_activation_scale(dictionary.path)
    if (dictionary.path / ACTIVATION_WHITENING_FILENAME).is_file():
        raise ValueError(
            f"{dictionary.path} is a checkpoint of a whitened run: publish the folder its trainer wrote at "
            f"the end"
        )
    if scale is not None and sae.cfg.normalize_activations == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(scale)
    sae.save_inference_model(folder)
    return folder
