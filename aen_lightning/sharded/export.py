"""Writes a sharded SAE as one SAELens folder; no rank ever holds more than its own part of the weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from sae_lens import TrainingSAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from safetensors import safe_open
from torch import Tensor

from aen_lightning.files import (
    read_json,
    replacing,
    safetensors_header,
    save_tensors,
    set_default_mode,
    write_json,
)
from aen_lightning.saes.aen import AENTrainingSAE
from aen_lightning.saes.export import ADAPTIVE_STATE_FILENAME, export_sae
from aen_lightning.saes.input_scaling import InputScaling
from aen_lightning.sharded.saes import FeatureSharded
from aen_lightning.sharded.sharding import FEATURE_DIM

_BLOCK_BYTES = 1 << 25


@torch.no_grad()
def export_sharded_sae(
    sae: TrainingSAE[Any],
    path: str | Path,
    *,
    input_scaling: InputScaling = InputScaling(),  # noqa: B008  # frozen
    log_sparsity: Tensor | None = None,
) -> Path:
    """Write what :func:`~aen_lightning.saes.export.export_sae` would write of the whole SAE.

    Collective. Each rank writes its features as a dictionary of their own into a hidden folder beside ``path``,
    which all ranks must reach; rank 0 then joins the files block by block and removes them.

    Args:
        sae: A sharded SAE.
        path: Folder to write; made if missing. Equal on all ranks.
        input_scaling: See there.
        log_sparsity: Of all features, shape (d_sae,).

    Returns:
        ``path``.

    Raises:
        FileNotFoundError: If the ranks do not share the file system of ``path``.
    """
    path = Path(path)
    parts = cast(FeatureSharded, sae).parts
    group = parts.mesh.get_group()
    hidden = path.with_name(f".{path.name}.parts")
    folders = [hidden / str(rank) for rank in range(parts.world_size)]
    export_sae(cast(FeatureSharded, sae).own_part(), folders[parts.rank], input_scaling=input_scaling)
    dist.barrier(group)
    if parts.rank == 0:
        missing = [str(f) for f in folders if not (f / SAE_WEIGHTS_FILENAME).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{', '.join(missing)} should have been written by another rank: export to a folder that all "
                "ranks share (ExportSAE.dirpath, or trainer.default_root_dir)"
            )
        path.mkdir(parents=True, exist_ok=True)
        _join_weights(folders, path / SAE_WEIGHTS_FILENAME)
        cfg = read_json(folders[0] / SAE_CFG_FILENAME) | {"d_sae": parts.d_sae}
        write_json(path / SAE_CFG_FILENAME, cfg)
        if isinstance(sae, AENTrainingSAE):
            save_tensors(path / ADAPTIVE_STATE_FILENAME, sae.adaptive_state())
        if log_sparsity is not None:
            save_tensors(path / SPARSITY_FILENAME, {"sparsity": log_sparsity.float().cpu().contiguous()})
        shutil.rmtree(hidden)
    dist.barrier(group)
    return path


def _join_weights(folders: Sequence[Path], path: Path) -> None:
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(folder / SAE_WEIGHTS_FILENAME, framework="pt"))
            for folder in folders
        ]
        names = list(files[0].keys())
        slices = {name: [file.get_slice(name) for file in files] for name in names}
        header = {name: (files[0].get_tensor(name).dtype, _whole_shape(name, slices[name])) for name in names}
        temporary = stack.enter_context(replacing(path))
        with temporary.open("wb") as out:
            out.write(safetensors_header(header, {"format": "pt"}))
            for name in names:
                for block in _blocks(name, slices[name]):
                    out.write(block.contiguous().flatten().view(torch.uint8).numpy().data)
        set_default_mode(temporary)


def _whole_shape(name: str, parts: Sequence[Any]) -> tuple[int, ...]:
    shape = list(parts[0].get_shape())
    if (dim := FEATURE_DIM[name]) is not None:
        shape[dim] = sum(part.get_shape()[dim] for part in parts)
    return tuple(shape)


def _blocks(name: str, parts: Sequence[Any]) -> Iterator[Tensor]:
    """The bytes of a whole tensor in the order of the file, a piece at a time."""
    dim = FEATURE_DIM[name]
    if dim == 1:  # a row of the whole has a piece of every rank
        n_rows, width = parts[0].get_shape()
        step = max(1, _BLOCK_BYTES // (8 * width * len(parts)))
        for start in range(0, n_rows, step):
            yield torch.cat([part[start : start + step] for part in parts], dim=1)
        return
    for part in parts if dim == 0 else parts[:1]:
        n_rows, *rest = part.get_shape()
        step = max(1, _BLOCK_BYTES // (8 * max(1, *rest)) if rest else n_rows)
        for start in range(0, n_rows, step):
            yield part[start : start + step]
