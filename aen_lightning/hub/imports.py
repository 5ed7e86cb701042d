"""The authors' checkpoints as SAELens dictionaries: on disk, or through SAELens's own ``converter`` argument.

``encoder.weight`` (d_sae, d_in) becomes ``W_enc`` (d_in, d_sae), ``decoder.weight`` (d_in, d_sae) becomes
``W_dec`` (d_sae, d_in); the formulas are the same: ``h = relu((x - b_dec) @ W_enc + b_enc)``, or the k
largest of it, and ``h @ W_dec + b_dec``, on activations scaled per token to norm sqrt(d_in). That scaling and
its inverse become SAELens's ``constant_norm_rescale``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.util import str_to_dtype
from torch import Tensor

from aen_lightning.files import (
    Transposed,
    require_finite,
    save_tensors,
    set_default_mode,
    stream_tensors,
    write_json,
)
from aen_lightning.hub.checkpoint import Checkpoint, Kind, read_checkpoint
from aen_lightning.hub.checkpoint_config import Scaling, config_of, metadata_of
from aen_lightning.hub.retry import hub_errors, with_retries
from aen_lightning.runs.weights import check_weights
from aen_lightning.saes.aen import AENTrainingSAE, AENTrainingSAEConfig
from aen_lightning.saes.export import ADAPTIVE_STATE_FILENAME

_HUB_FILE = re.compile(
    r"hf://(?P<repo>[\w-][\w.-]*/[\w.-]+?)(?:@(?P<revision>[^/]+))?/(?P<file>.+\.(?:pt|pth))"
)


def fetch_checkpoint(
    source: str, *, endpoint: str | None = None, token: str | None = None
) -> tuple[Path, str]:
    """A local path as it is, or ``hf://OWNER/REPO[@REVISION]/PATH.pt`` through huggingface_hub's cache.

    Returns:
        The file, and the name that says what is in it.

    Raises:
        HubError: If it cannot be had from the Hub.
        ValueError: For an address that is none.
    """
    if not source.startswith("hf://"):
        return Path(source), Path(source).resolve().as_posix()
    match = _HUB_FILE.fullmatch(source)
    if match is None:
        raise ValueError(
            f"expected hf://OWNER/REPO/PATH.pt or hf://OWNER/REPO@REVISION/PATH.pt, got {source!r}"
        )
    repo_id, file = match["repo"], match["file"]
    api = HfApi(endpoint=endpoint, token=token)
    with hub_errors(repo_id, "reading"):
        path = with_retries(
            lambda: api.hf_hub_download(repo_id, file, revision=match["revision"]), f"downloading {file}"
        )
    return Path(path), f"{repo_id}/{file}"


def import_checkpoint(
    path: str | Path,
    folder: str | Path,
    *,
    name: str | None = None,
    kind: Kind | None = None,
    k: int | None = None,
    input_scaling: Scaling | None = None,
    model_name: str | None = None,
    hook_name: str | None = None,
    for_training: bool = False,
) -> Path:
    """Convert one of the authors' checkpoints into a SAELens folder.

    Weights go from the mapped file to the new one in slices, so memory holds little more than the pages of
    the source.

    Args:
        path: The ``.pt`` file.
        folder: Made if missing; must not hold a dictionary yet.
        name: Path in the authors' repository, which says model, kind and k; None: ``path``.
        kind: What was trained, where the name does not say it.
        k: Of a TopK model, where the name does not say it.
        input_scaling: Of the activations it was trained on; None: per token, or none for the authors'
            synthetic data.
        model_name: Language model, where the name does not say it.
        hook_name: TransformerLens name of the hook, likewise.
        for_training: Write the training SAE ``aen`` with its adaptive state, to be trained on; else an
            inference dictionary, and the adaptive state, if there is any, in ``adaptive_state.safetensors``
            beside it.

    Returns:
        ``folder``.

    Raises:
        ValueError: If the checkpoint is refused (see :func:`~aen_lightning.hub.checkpoint.read_checkpoint`),
            or if it holds numbers that are not finite.
        FileExistsError: If the folder holds a dictionary.
    """
    folder = Path(folder)
    if (folder / SAE_CFG_FILENAME).exists():
        raise FileExistsError(f"{folder} holds a dictionary already: name another folder, or remove it")
    checkpoint = read_checkpoint(path, name=name, kind=kind, k=k)
    metadata = metadata_of(checkpoint, model_name, hook_name)
    if for_training:
        return _write_for_training(checkpoint, folder, metadata)
    cfg = config_of(checkpoint, metadata, input_scaling)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / SAE_WEIGHTS_FILENAME
    stream_tensors(
        weights,
        {
            "W_enc": Transposed(checkpoint.encoder),
            "W_dec": Transposed(checkpoint.decoder),
            "b_enc": checkpoint.encoder_bias,
            "b_dec": checkpoint.b_dec,
        },
    )
    check_weights(cfg, weights)
    state = _adaptive_state(checkpoint)
    if state:
        save_tensors(folder / ADAPTIVE_STATE_FILENAME, state)
    write_json(folder / SAE_CFG_FILENAME, cfg)
    return folder


def authors_checkpoint_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
    *,
    kind: Kind | None = None,
    k: int | None = None,
    input_scaling: Scaling | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """A SAELens converter for a checkpoint on the Hub.

    ``SAE.from_pretrained(AUTHORS_REPO, "checkpoints/....pt", converter=authors_checkpoint_loader)``

    Args:
        repo_id: Repository with the checkpoint.
        folder_name: Path of the ``.pt`` file in it.
        device: Where the weights go.
        force_download: Fetch it even if it is cached.
        cfg_overrides: SAELens's, ``dtype`` among them.
        kind: With ``functools.partial``, where the name does not say it.
        k: Likewise.
        input_scaling: Likewise.
    """
    with hub_errors(repo_id, "reading"):
        path = with_retries(
            lambda: HfApi().hf_hub_download(repo_id, folder_name, force_download=force_download),
            f"downloading {folder_name}",
        )
    return _components(Path(path), f"{repo_id}/{folder_name}", device, cfg_overrides, kind, k, input_scaling)


def authors_checkpoint_disk_loader(
    path: str | Path,
    device: str = "cpu",
    cfg_overrides: dict[str, Any] | None = None,
    *,
    kind: Kind | None = None,
    k: int | None = None,
    input_scaling: Scaling | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """For a local file: ``SAE.load_from_disk("....pt", converter=authors_checkpoint_disk_loader)``."""
    name = Path(path).resolve().as_posix()
    return _components(Path(path), name, device, cfg_overrides, kind, k, input_scaling)[:2]


def _components(
    path: Path,
    name: str,
    device: str,
    overrides: dict[str, Any] | None,
    kind: Kind | None,
    k: int | None,
    scaling: Scaling | None,
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    checkpoint = read_checkpoint(path, name=name, kind=kind, k=k)
    cfg = {
        **config_of(checkpoint, metadata_of(checkpoint, None, None), scaling),
        "device": device,
        **(overrides or {}),
    }
    dtype = str_to_dtype(cfg["dtype"])
    state = {
        "W_enc": checkpoint.encoder.T,
        "W_dec": checkpoint.decoder.T,
        "b_enc": checkpoint.encoder_bias,
        "b_dec": checkpoint.b_dec,
    }
    # a copy in any case: a mapped tensor would change the file when it is written to
    copies = {n: torch.empty(t.shape, dtype=dtype, device=device).copy_(t) for n, t in state.items()}
    require_finite(copies.items(), path.name)
    return cfg, copies, None


def _adaptive_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    if checkpoint.ema is None:
        return {}
    steps = {} if checkpoint.n_steps is None else {"n_observed_steps": torch.tensor(checkpoint.n_steps)}
    return {"feature_acts_ema": checkpoint.ema.float().clone(), **steps}


def _write_for_training(checkpoint: Checkpoint, folder: Path, metadata: dict[str, Any]) -> Path:
    if checkpoint.kind == "topk":
        raise ValueError(
            "a TopK model is no AEN-SAE: it cannot be trained on as one; import it without for_training"
        )
    s = checkpoint.settings
    adaptive = checkpoint.ema is not None
    if "lambda_1" not in s or (adaptive and "gamma" not in s):
        raise ValueError(
            f"{checkpoint.source} does not say lambda_1 and gamma, which training on needs; import it "
            f"without for_training"
        )
    rest = {
        field: s[key]
        for key, field in (("beta", "ema_decay"), ("top_fraction", "reference_fraction"))
        if key in s
    }
    cfg = AENTrainingSAEConfig.from_paper(
        d_in=checkpoint.d_in, d_sae=checkpoint.d_sae, lambda_1=s["lambda_1"], lambda_2=s.get("lambda_2", 0.0),
        gamma=s["gamma"] if adaptive else 0.0, dtype=str(checkpoint.dtype).removeprefix("torch."), **rest,
    )  # fmt: skip
    for key, value in metadata.items():
        cfg.metadata[key] = value
    sae = AENTrainingSAE(cfg)
    with torch.no_grad():
        sae.W_enc.copy_(checkpoint.encoder.T)
        sae.W_dec.copy_(checkpoint.decoder.T)
        sae.b_enc.copy_(checkpoint.encoder_bias)
        sae.b_dec.copy_(checkpoint.b_dec)
        for name, tensor in _adaptive_state(checkpoint).items():
            getattr(sae, name).copy_(tensor)
        require_finite(sae.state_dict().items(), checkpoint.source)
        sae.set_ramp(sae.scheduled_ramp(int(sae.n_observed_steps)))
        sae.refresh_weights()
    weights, _ = sae.save_model(folder)
    set_default_mode(weights)
    return folder
