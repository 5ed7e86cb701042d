"""Conversion between our shards and SAELens's cached-activation dataset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor

from aen_lightning.compat import consolidate_saelens_shards
from aen_lightning.files import DTYPES, ModelDtype
from aen_lightning.shards.manifest import Manifest, ShardError, require_disk
from aen_lightning.shards.read import ShardSet, open_activations
from aen_lightning.shards.saelens_cache import SAELensCache
from aen_lightning.shards.source import ActivationSource
from aen_lightning.shards.write import ShardFolder, ShardStream


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Args:
        path: Where the new set is.
        n_tokens: Rows in it.
        n_dropped: Rows at the end that fill no whole row of ``context_size`` (SAELens has no other), left
            out.
        dtype: Of the new set.
        notes: What the user should know.
    """

    path: Path
    n_tokens: int
    n_dropped: int
    dtype: str
    notes: tuple[str, ...] = ()


def _new_folder(path: str | Path) -> Path:
    folder = Path(path)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _chunks(source: ActivationSource, n_tokens: int) -> Iterator[dict[str, Tensor]]:
    """All rows in order, in pieces of ``n_tokens``; the last may be shorter. ``token_ids`` come along."""
    pending: dict[str, Tensor] = {}
    for i in range(len(source.part_sizes)):
        part, at = source.part(i), 0
        while at < source.part_sizes[i]:
            have = len(next(iter(pending.values()))) if pending else 0
            take = {k: t[at : at + n_tokens - have] for k, t in part.items()}
            at += n_tokens - have
            pending = {k: torch.cat([pending[k], t]) if have else t for k, t in take.items()}
            if len(next(iter(pending.values()))) == n_tokens:
                yield pending
                pending = {}
    if pending:
        yield pending


def to_saelens(
    source_path: str | Path,
    target_path: str | Path,
    *,
    dtype: str | None = None,
    context_size: int | None = None,
    buffer_size_mib: int = 256,
    force_disk: bool = False,
) -> Conversion:
    """Write a set of shards as the dataset that SAELens reads with ``use_cached_activations``.

    SAELens's rows are (context_size, d_in): where filters took tokens out, rows are filled up from the next
    context. Its trainer flattens rows, so nothing it does depends on that.

    Args:
        source_path: Our shards.
        target_path: New or empty folder.
        dtype: ``float32`` or ``float16``; None: that of the shards, and float32 for bfloat16, which Arrow
            does not have.
        context_size: Tokens a row; None: that of the harvest.
        buffer_size_mib: Of activations held in memory.
        force_disk: Begin even if the disk is too small.

    Raises:
        ShardError: If the source is damaged, or a value does not fit float16.
        ValueError: For another dtype.
    """
    import datasets

    source, notes = ShardSet(source_path), []
    stored = source.manifest.dtype
    if dtype is None and stored == "bfloat16":
        notes.append(
            "SAELens's cache (Arrow) has no bfloat16: written as float32, exactly, at twice the size"
        )
    dtype = dtype or ("float32" if stored == "bfloat16" else stored)
    if dtype not in ("float32", "float16"):
        raise ValueError(f"SAELens's cache holds float32 or float16, not {dtype!r}")
    if stored != dtype == "float16":
        notes.append(f"{stored} was rounded to float16")
    context_size = context_size or source.manifest.context_size
    require_disk(
        Path(target_path),
        source.n_tokens * (sum(source.d_in.values()) * DTYPES[dtype].itemsize + 4),
        force=force_disk,
    )
    target = _new_folder(target_path)
    features = datasets.Features(
        {h: datasets.Array2D(shape=(context_size, d), dtype=dtype) for h, d in source.d_in.items()}
        | {"token_ids": datasets.Sequence(datasets.Value("int32"), length=context_size)}
    )
    row_bytes = context_size * sum(source.d_in.values()) * 4
    rows_per_piece = max(1, buffer_size_mib * 2**20 // row_bytes)
    if source.n_tokens < context_size:
        raise ShardError(
            f"{source.path} has {source.n_tokens} tokens, fewer than one row of context_size {context_size}"
        )
    n_tokens, pieces = 0, target / ".tmp_shards"
    for i, piece in enumerate(_chunks(source, rows_per_piece * context_size)):
        n_rows = len(piece["token_ids"]) // context_size
        if not n_rows:
            continue
        columns = {}
        for name, tensor in piece.items():
            rows = tensor[: n_rows * context_size].view(n_rows, context_size, *tensor.shape[1:])
            columns[name] = (
                rows if name == "token_ids" else _fit(rows, dtype, f"{source.path}, {name}")
            ).numpy()
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(
            str(pieces / f"shard_{i:05d}"), num_shards=1
        )
        n_tokens += n_rows * context_size
    consolidate_saelens_shards(pieces, target)
    n_dropped = source.n_tokens - n_tokens
    if n_dropped:
        notes.append(f"the last {n_dropped} tokens fill no row of {context_size} and were left out")
    return Conversion(target, n_tokens, n_dropped, dtype, tuple(notes))


def _fit(x: Tensor, dtype: str, where: str) -> Tensor:
    converted = x.to(DTYPES[dtype])
    if dtype == "float16" and not converted.isfinite().all() and x.isfinite().all():
        raise ShardError(
            f"{where}: a value of {x.abs().max().item():.4g} does not fit float16 (65504): convert to float32"
        )
    return converted


def from_saelens(
    source_path: str | Path,
    target_path: str | Path,
    *,
    dtype: str | None = None,
    shard_size_mib: int = 256,
    model_name: str | None = None,
    force_disk: bool = False,
) -> Conversion:
    """Write a dataset that SAELens cached as shards.

    Args:
        source_path: Folder SAELens wrote.
        target_path: New or empty folder.
        dtype: On disk; None: as in the dataset. bfloat16 halves float32.
        shard_size_mib: About the size of a shard.
        model_name: For the metadata; the dataset does not say it.
        force_disk: Begin even if the disk is too small.
    """
    source = SAELensCache(source_path)
    stored = str(source.dtype).removeprefix("torch.")
    dtype = dtype or stored
    if dtype not in get_args(ModelDtype):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    assert source.context_size is not None
    hook_names = list(source.d_in)
    manifest = Manifest(
        d_in=source.d_in,
        dtype=cast(ModelDtype, dtype),
        context_size=source.context_size,
        metadata={
            "model_name": model_name,
            "hook_name": hook_names[0] if len(hook_names) == 1 else hook_names,
            "context_size": source.context_size,
        },
        settings={"converted_from": "SAELens cached activations"},
    )
    require_disk(Path(target_path), source.n_tokens * manifest.bytes_per_token, force=force_disk)
    folder = ShardFolder(_new_folder(target_path))
    folder.begin(manifest)
    per_shard = max(1, shard_size_mib * 2**20 // manifest.bytes_per_token)
    notes = [f"{stored} was rounded to {dtype}"] if DTYPES[dtype].itemsize < source.dtype.itemsize else []
    if "token_ids" not in source.part(0):
        notes.append("the dataset has no token_ids: written as -1")
    for i, piece in enumerate(_chunks(source, per_shard)):
        n = len(piece[hook_names[0]])
        ids = piece.pop("token_ids", torch.full((n,), -1, dtype=torch.int32))
        stream = ShardStream(folder.path, i, source.d_in, dtype, n)
        stream.append({h: _fit(x, dtype, f"{source.path}, {h}") for h, x in piece.items()}, ids)
        stream.close()
    manifest = folder.collect(complete=True)
    return Conversion(folder.path, manifest.n_tokens, 0, dtype, tuple(notes))


def convert(
    source_path: str | Path, target_path: str | Path, *, dtype: str | None = None, force_disk: bool = False
) -> Conversion:
    """Convert shards to SAELens's cache, or SAELens's cache to shards: whichever the source is not.

    Raises:
        FileNotFoundError: If the source is neither.
    """
    ours = isinstance(open_activations(source_path, verify="never"), ShardSet)
    return (to_saelens if ours else from_saelens)(
        source_path, target_path, dtype=dtype, force_disk=force_disk
    )
