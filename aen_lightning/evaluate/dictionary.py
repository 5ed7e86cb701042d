"""Any SAELens dictionary, loaded and run: what evaluation and diagnosis share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from torch import Tensor

from aen_lightning.files import read_safetensors_header, require_finite
from aen_lightning.runs.dictionary import read_activation_scale, read_cfg, read_log_sparsity
from aen_lightning.runs.weights import FOREIGN_ERRORS, check_config
from aen_lightning.spelling import printable

_ELEMENTS_PER_CHUNK = 2**25  # of a (tokens, d_sae) matrix of activations: 128 MiB in float32


def load_dictionary(reference: str | Path, *, device: str = "cpu", dtype: str | None = None) -> SAE[Any]:
    """Load a dictionary for inference, any SAELens architecture, and make it take flat activations (...,
    d_in).

    Args:
        reference: A SAELens folder (``cfg.json`` and ``sae_weights.safetensors``), or ``RELEASE:ID`` for
            ``SAE.from_pretrained(RELEASE, ID)``, where RELEASE is one SAELens knows or a Hub repository
            ``OWNER/REPO``.
        device: Where to put it.
        dtype: ``float32``, ``bfloat16``, ...; None keeps what is stored (``float32`` from the Hub).

    Returns:
        The dictionary in eval mode, without gradients. An average scale that SAELens's trainer left in
        ``activation_scaler.json`` is folded in, so it takes and returns raw activations.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is damaged, a training checkpoint, a transcoder, needs a scale that is not there, or
            holds a number that is not finite; it says which file, field or tensor.
    """
    folder = Path(reference)
    if (folder / SAE_CFG_FILENAME).is_file():
        sae = _load_folder(folder, device, dtype)
    elif folder.is_dir():
        found = sorted(str(p.parent) for p in folder.rglob(SAE_CFG_FILENAME))
        hint = f"; give one of {', '.join(found[:5])}" if found else ""
        raise FileNotFoundError(f"{folder} holds no dictionary (no cfg.json){hint}")
    elif ":" in str(reference):
        release, _, sae_id = str(reference).partition(":")
        sae = SAE.from_pretrained(release, sae_id, device=device, dtype=dtype or "float32")
        check_config(sae.cfg.to_dict(), str(reference))
    else:
        raise FileNotFoundError(
            f"no dictionary {str(reference)!r}: expected a folder with cfg.json and "
            "sae_weights.safetensors, or RELEASE:ID"
        )
    require_finite(sae.state_dict().items(), reference)
    if "transcoder" in sae.cfg.architecture():
        raise ValueError(
            f"{reference} is a {sae.cfg.architecture()}: it predicts another activation than its input, "
            "and what is "
            "measured here is how well a dictionary reconstructs its input"
        )
    if sae.cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        raise ValueError(
            f"{reference} expects activations scaled by SAELens's trainer "
            f"({sae.cfg.normalize_activations}), and no scale "
            "came with it: export it when training has ended, which folds the scale into the weights"
        )
    sae.turn_off_forward_pass_hook_z_reshaping()  # our activations come with heads flattened
    return sae.eval().requires_grad_(False)


def _load_folder(folder: Path, device: str, dtype: str | None) -> SAE[Any]:
    cfg = read_cfg(folder)
    if not (folder / SAE_WEIGHTS_FILENAME).is_file():
        raise FileNotFoundError(f"{folder} holds {SAE_CFG_FILENAME} and no {SAE_WEIGHTS_FILENAME}")
    read_safetensors_header(folder / SAE_WEIGHTS_FILENAME)
    try:
        sae = SAE.load_from_disk(folder, device=device, dtype=dtype)
    except FOREIGN_ERRORS as err:
        raise ValueError(
            f"{folder} holds no dictionary for inference "
            f"({printable(str(cfg.get('architecture', 'no architecture')))[:60]}: {printable(str(err), at_most=300)}); if it is a "
            "training checkpoint, export it with save_inference_model"
        ) from err
    if sae.cfg.normalize_activations == "expected_average_only_in":
        scale = read_activation_scale(folder)
        if scale is not None:
            sae.fold_activation_norm_scaling_factor(scale)
    return sae


def log_sparsity(reference: str | Path) -> Tensor | None:
    """``log10`` of each feature's firing rate as stored beside a dictionary in a folder, shape (d_sae,).

    None if not.
    """
    return read_log_sparsity(Path(reference))


def describe_dictionary(sae: SAE[Any], reference: str | Path) -> dict[str, Any]:
    """What a dictionary says of itself, for the head of a result."""
    metadata = sae.cfg.metadata
    keys = (
        "training_architecture", "training_architecture_details", "model_name", "hook_name", "hf_hook_name",
        "context_size", "dataset_path",
    )  # fmt: skip
    return {
        "path": str(reference),
        "architecture": sae.cfg.architecture(),
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "normalize_activations": sae.cfg.normalize_activations,
        **{key: metadata[key] for key in keys},
    }


@torch.no_grad()
def run_dictionary(sae: SAE[Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode and decode.

    Args:
        sae: The dictionary.
        x: Activations (..., d_in); raw ones, or inside :func:`scaled_space` scaled ones.

    Returns:
        ``feature_acts`` (..., d_sae), dense, and ``x_hat`` (..., d_in), both at least float32.
    """
    feature_acts = sae.encode(x.to(sae.device))
    # a temporal SAE adds what it predicts from earlier tokens to what its code says
    x_hat = sae(x.to(sae.device)) if sae.cfg.architecture() == "temporal" else sae.decode(feature_acts)
    if feature_acts.is_sparse:
        feature_acts = feature_acts.to_dense()
    return _at_least_float32(feature_acts), _at_least_float32(x_hat)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def to_scaled_space(sae: SAE[Any], x: Tensor) -> Tensor:
    """Raw activations as the dictionary sees them after its own run-time normalisation; shape (..., d_in)."""
    scaled = sae.run_time_activation_norm_fn_in(x.to(sae.device, sae.dtype))
    for left_over in (
        "x_norm_coeff",
        "ln_mu",
        "ln_std",
    ):  # SAELens keeps them for the decode that will not come
        sae.__dict__.pop(left_over, None)
    return _at_least_float32(scaled)


@contextmanager
def scaled_space(sae: SAE[Any]) -> Iterator[SAE[Any]]:
    """While open, ``encode`` and ``decode`` take and return activations in the space the dictionary was
    trained in.

    SAELens's ``constant_norm_rescale`` and ``layer_norm`` are switched off; for other dictionaries nothing
    changes.
    """
    before = sae.run_time_activation_norm_fn_in, sae.run_time_activation_norm_fn_out
    sae.run_time_activation_norm_fn_in = sae.run_time_activation_norm_fn_out = lambda x: x
    try:
        yield sae
    finally:
        sae.run_time_activation_norm_fn_in, sae.run_time_activation_norm_fn_out = before


def tokens_per_chunk(sae: SAE[Any]) -> int:
    """Tokens to encode at a time, so that a matrix of activations stays near 128 MiB."""
    return max(1, _ELEMENTS_PER_CHUNK // sae.cfg.d_sae)
