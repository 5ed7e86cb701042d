"""Language models sharded over ranks by FSDP2, each rank reading only its own part of the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from aen_lightning.compat import find_in_repository, initialize, local_slice
from aen_lightning.files import DTYPES, ModelDtype, read_safetensors_header
from aen_lightning.language_model.checkpoint_files import checkpoint_keys, read_weight_map
from aen_lightning.language_model.cut_model import (
    CutModel,
    build_cut_model,
    load_config,
    resolve_hooks,
)
from aen_lightning.language_model.families import layers_of

_WHERE = ("token", "cache_dir", "local_files_only", "subfolder")


def shard_model(base_model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard a base model over a 1-D mesh: an FSDP2 unit for each decoder block, the input embedding, and the
    rest.

    Whatever part runs is gathered just before and freed just after, so a rank's peak is its share plus the
    largest unit (two blocks, as the next is gathered while one computes, or the embedding).
    """
    for unit in (*layers_of(base_model), base_model.get_input_embeddings(), base_model):
        # said for the root, which would by default stay gathered
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def load_sharded_cut_model(
    model_name: str,
    hook_names: Sequence[str],
    *,
    mesh: DeviceMesh,
    revision: str | None = None,
    dtype: ModelDtype = "bfloat16",
    device: torch.device | str = "cpu",
    model_from_pretrained_kwargs: dict[str, Any] | None = None,
) -> CutModel:
    """Load a cut model sharded over the ranks of a mesh; no process ever holds it whole.

    The model is made on the meta device, sharded, and each rank then reads the slices it holds out of the
    safetensors files.

    Args:
        model_name: Hub name or folder.
        hook_names: See ``resolve_hook``.
        mesh: One-dimensional.
        revision: Branch, tag or commit on the Hub.
        dtype: Of weights and activations.
        device: This rank's.
        model_from_pretrained_kwargs: ``attn_implementation``, ``token``, ``cache_dir``, ``local_files_only``,
            ``subfolder``.

    Returns:
        The model. Every rank must call ``activations`` equally often.

    Raises:
        ValueError: For other keywords (quantized weights cannot be sharded), or a checkpoint without
            safetensors files.
    """
    kwargs = dict(model_from_pretrained_kwargs or {})
    attention = {k: kwargs.pop(k) for k in ("attn_implementation",) if k in kwargs}
    where: dict[str, Any] = {k: kwargs.pop(k) for k in _WHERE if k in kwargs}
    if kwargs:
        raise ValueError(
            f"a model sharded by FSDP2 cannot take {', '.join(map(repr, sorted(kwargs)))} of "
            "model_from_pretrained_kwargs: leave it out, or take another strategy (ddp: a whole model on "
            "every rank)"
        )
    config = load_config(model_name, revision=revision, model_from_pretrained_kwargs=where | attention)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{model_name} is quantized, which FSDP2 cannot shard here: take strategy ddp")
    hooks = resolve_hooks(config, hook_names)
    config.dtype = DTYPES[dtype]  # casting afterwards would also cast buffers that have to stay float32
    with torch.device("meta"):
        base = build_cut_model(config, hooks)
    files = _checkpoint_files(model_name, revision, where)
    keys = checkpoint_keys(base, list(files))
    shard_model(base, mesh)
    base.to_empty(device=device)
    _rebuild_computed_buffers(base)
    _load_local_slices(base, keys, files)
    return CutModel(base, hooks, batch_threads=False)  # the ranks gather weights in one order


class _Files(dict[str, str]):
    """Checkpoint key -> name of the file that holds it; files are fetched when first opened."""

    def __init__(self, model_name: str, revision: str | None, where: dict[str, Any]) -> None:
        super().__init__()
        self.model_name, self.revision, self.where = model_name, revision, where

    def find(self, name: str) -> Path | None:
        return find_in_repository(self.model_name, name, revision=self.revision or "main", **self.where)


def _checkpoint_files(model_name: str, revision: str | None, where: dict[str, Any]) -> _Files:
    files = _Files(model_name, revision, where)
    if (index := files.find("model.safetensors.index.json")) is not None:
        files.update(read_weight_map(index))
    elif (whole := files.find("model.safetensors")) is not None:
        files.update(dict.fromkeys(read_safetensors_header(whole), "model.safetensors"))
    else:
        raise ValueError(
            f"{model_name} has no safetensors files, of which each rank could read its part: take strategy "
            "ddp"
        )
    return files


def _rebuild_computed_buffers(base: PreTrainedModel) -> None:
    """Buffers that no checkpoint has (rotary frequencies, embedding scales) were lost on the meta device:
    compute them again."""
    lost = {name for name, _ in base.named_buffers(remove_duplicate=False)} - base.state_dict().keys()
    for owner in {name.rpartition(".")[0] for name in lost}:
        initialize(base, base.get_submodule(owner))


def _load_local_slices(base: PreTrainedModel, keys: dict[str, str], files: _Files) -> None:
    by_file: dict[str, list[str]] = {}
    for name, key in keys.items():
        by_file.setdefault(files[key], []).append(name)
    state = base.state_dict()
    for file, names in by_file.items():
        path = files.find(file)
        if path is None:
            raise ValueError(f"{files.model_name} lacks {file}, which its index lists")
        with safe_open(path, framework="pt") as f:
            for name in names:
                _copy_slice(state[name], f.get_slice(keys[name]), name)


def _copy_slice(target: Tensor, source: Any, name: str) -> None:
    if tuple(source.get_shape()) != tuple(target.shape):
        raise ValueError(
            f"{name} has shape {tuple(source.get_shape())} in the checkpoint, {tuple(target.shape)} in the "
            "model"
        )
    local, wanted = target, tuple(slice(0, n) for n in target.shape)
    if isinstance(target, DTensor):
        local = target.to_local()
        wanted = local_slice(target)
    if local.numel():
        with torch.no_grad():
            local.copy_(source[wanted] if wanted else source[...])
