"""Writes a trained SAE as a SAELens folder that takes and returns raw, unscaled activations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAE, TrainingSAEConfig
from sae_lens.constants import SPARSITY_FILENAME
from torch import Tensor

from aen_lightning.files import disk_errors_named, save_tensors, set_default_mode
from aen_lightning.saes.aen import AENTrainingSAE
from aen_lightning.saes.input_scaling import InputScaling

ADAPTIVE_STATE_FILENAME = "adaptive_state.safetensors"
"""Beside a dictionary's weights.

Running means and L1 weights at the end of training, which no inference SAE holds.
"""


def check_scaling(cfg: TrainingSAEConfig, scaling: InputScaling) -> None:
    """Refuse a combination of the SAE's own normalisation and the data's scaling that has no single meaning.

    Raises:
        ValueError: If both would scale, or if the SAE's normalisation needs something only SAELens's trainer
            does.
    """
    own = cfg.normalize_activations
    if own == "covariance_whitening":
        raise ValueError(
            "normalize_activations='covariance_whitening' is estimated and applied by SAELens's own trainer: "
            "use LanguageModelSAETrainingRunner for it, or another normalisation here"
        )
    if own == "expected_average_only_in":
        if scaling.kind != "average":
            raise ValueError(
                "normalize_activations='expected_average_only_in' needs activations scaled by their "
                "average norm, "
                f"but the data module scales them by {scaling.kind!r}: set its input_scaling to 'average'"
            )
    elif own != "none" and scaling.kind != "none":
        raise ValueError(
            f"activations would be scaled twice: normalize_activations={own!r} in the SAE and "
            f"input_scaling={scaling.kind!r} in the data module; set one of them to 'none'"
        )


@torch.no_grad()
def export_sae(
    sae: TrainingSAE[Any],
    path: str | Path,
    *,
    input_scaling: InputScaling = InputScaling(),  # noqa: B008  # frozen
    log_sparsity: Tensor | None = None,
) -> Path:
    """Write ``cfg.json``, ``sae_weights.safetensors`` and, if given, ``sparsity.safetensors``.

    For ``aen`` also ``adaptive_state.safetensors``, for diagnosis; SAELens does not read it.

    The dictionary on disk takes and returns raw activations: per-token scaling becomes SAELens's
    ``constant_norm_rescale``, an average scale is folded into the weights. ``sae`` is left as it is; one copy
    of its weights is made when a scale must be folded.

    Args:
        sae: Any SAELens training SAE.
        path: Folder to write; made if missing.
        input_scaling: The scaling its training data had.
        log_sparsity: ``log10`` of each feature's firing rate per token, shape (d_sae,), as SAELens stores it.

    Returns:
        ``path``.
    """
    check_scaling(sae.cfg, input_scaling)
    path = Path(path)
    if input_scaling.kind == "average":
        assert input_scaling.factor is not None  # InputScaling checks it
        folded = type(sae)(copy.deepcopy(sae.cfg))
        folded.load_state_dict(sae.state_dict())
        folded.fold_activation_norm_scaling_factor(input_scaling.factor)
        weights = _save(path, folded)
    elif input_scaling.kind == "per_token":
        own = sae.cfg.normalize_activations
        # the literal of SAELens's field forgets this value; its __post_init__ and run time accept it
        sae.cfg.normalize_activations = "constant_norm_rescale"
        try:
            weights = _save(path, sae)
        finally:
            sae.cfg.normalize_activations = own
    else:
        weights = _save(path, sae)
    set_default_mode(weights)
    if isinstance(sae, AENTrainingSAE):
        save_tensors(path / ADAPTIVE_STATE_FILENAME, sae.adaptive_state())
    if log_sparsity is not None:
        save_tensors(path / SPARSITY_FILENAME, {"sparsity": log_sparsity.float().cpu().contiguous()})
    return path


def _save(path: Path, sae: TrainingSAE[Any]) -> Path:
    with disk_errors_named(path):
        weights, _ = sae.save_inference_model(path)
    return Path(weights)
