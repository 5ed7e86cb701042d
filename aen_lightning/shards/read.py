"""Reading activations from disk, memory-mapped: our shards and SAELens's cached-activation datasets."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aen_lightning.files import DTYPES, human_size
from aen_lightning.shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardError,
    ShardRecord,
    file_inside,
    loose_records,
)
from aen_lightning.shards.saelens_cache import SAELensCache
from aen_lightning.shards.source import ActivationSource
from aen_lightning.shards.stamps import is_stamped, read_stamps, stamp, write_stamps
from aen_lightning.spelling import printable

Verify = Literal["once", "always", "never"]


class ShardSet(ActivationSource):
    """A folder of our shards.

    Args:
        path: Folder with a ``manifest.json``.
        allow_incomplete: Take the shards that are there of a harvest that runs or was cut off.
        verify: ``once``: compare each shard's SHA-256 with the manifest unless it is known to be the file that
            was compared before (the notes are in ``.verified.json``, see :mod:`aen_lightning.shards.stamps`);
            ``always``; ``never``: sizes only.

    Raises:
        FileNotFoundError: If there is no set.
        ShardError: If it is incomplete, or a shard is missing or damaged; names the file.
    """

    def __init__(self, path: str | Path, *, allow_incomplete: bool = False, verify: Verify = "once") -> None:
        if verify not in ("once", "always", "never"):
            raise ValueError(f"verify must be 'once', 'always' or 'never', got {verify!r}")
        self.path = Path(path)
        self.manifest = Manifest.read(self.path, with_loose_records=allow_incomplete)
        if not self.manifest.complete and not allow_incomplete:
            done = len({s.index for s in [*self.manifest.shards, *loose_records(self.path)]})
            raise ShardError(
                f"{self.path} is incomplete: {done} of {self.manifest.n_shards or 'an unknown number of'} "
                "shards are there. Finish the harvest (run it again), or allow_incomplete=True to use what "
                "there is"
            )
        if not self.manifest.n_tokens:
            raise ShardError(
                f"{self.path} holds no activations: its {len(self.manifest.shards)} shards are empty"
            )
        self.d_in, self.dtype = self.manifest.d_in, DTYPES[self.manifest.dtype]
        self.context_size, self.metadata = self.manifest.context_size, self.manifest.sae_metadata()
        self.records = [s for s in self.manifest.shards if s.n_tokens]
        self.part_sizes = [s.n_tokens for s in self.records]
        self._parts: dict[int, dict[str, Tensor]] = {}
        for record in self.records:
            _check_size(self.path, record)
        if verify != "never":
            _check_hashes(self.path, self.records, again=verify == "always")

    def part(self, index: int) -> dict[str, Tensor]:
        """See base class. A mapped shard stays mapped; pages in memory are the system's cache."""
        if index not in self._parts:
            self._parts[index] = _open_shard(self.path, self.records[index], self.manifest)
        return self._parts[index]


def _open_shard(folder: Path, record: ShardRecord, manifest: Manifest) -> dict[str, Tensor]:
    path, names = file_inside(folder, record.file), ["token_ids", *manifest.d_in]
    try:
        tensors = load_file(path)  # mapped: pages are read when they are used
    except (SafetensorError, OSError) as e:
        raise ShardError(f"{path} cannot be read: {e}") from e
    if sorted(tensors) != sorted(names):
        raise ShardError(f"{path} holds {sorted(tensors)}, expected {sorted(names)}")
    for name, tensor in tensors.items():
        shape = (record.n_tokens,) if name == "token_ids" else (record.n_tokens, manifest.d_in[name])
        dtype = torch.int32 if name == "token_ids" else DTYPES[manifest.dtype]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ShardError(
                f"{path}: {name!r} is {tuple(tensor.shape)} {tensor.dtype}, by the manifest it should be "
                f"{shape} {dtype}"
            )
    return tensors


def _check_size(folder: Path, record: ShardRecord) -> None:
    path = file_inside(folder, record.file)
    if not path.is_file():
        raise ShardError(
            f"{path} is missing, and the manifest lists it: fetch it again, or harvest into this folder again"
        )
    if (size := path.stat().st_size) != record.n_bytes:
        raise ShardError(
            f"{path} has {size} bytes, by the manifest it should have {record.n_bytes}: it is cut off or "
            "damaged"
        )


def _check_hash(folder: Path, record: ShardRecord) -> list[str | int]:
    """The stamp of a shard that has the hash it should; taken before, so that a change meanwhile shows."""
    before = stamp(folder, record)
    with (folder / record.file).open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != record.sha256:
        raise ShardError(
            f"{folder / record.file} is damaged: its SHA-256 is {found[:12]}..., by the manifest "
            f"{record.sha256[:12]}.... Fetch it again, or delete it and harvest into this folder again"
        )
    return before


def _check_hashes(folder: Path, records: Sequence[ShardRecord], *, again: bool) -> None:
    """Compare hashes, several files at a time, and note what was compared."""
    stamps = read_stamps(folder)
    due = [r for r in records if again or not is_stamped(folder, r, stamps)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        fresh = dict(zip((r.file for r in due), pool.map(lambda r: _check_hash(folder, r), due), strict=True))
    if any(stamps.get(name) != new for name, new in fresh.items()):
        try:
            write_stamps(folder, stamps | fresh)
        except OSError as e:
            warnings.warn(
                f"cannot note in {folder} that its shards were verified ({e}): they are hashed at each "
                "opening",
                stacklevel=3,
            )


def verify(path: str | Path) -> Manifest:
    """Check a set in full: every shard there, of the right size, SHA-256, shapes and dtypes.

    Raises:
        ShardError: At the first file that is not; names it.
    """
    folder = Path(path)
    manifest = Manifest.read(folder, with_loose_records=True)
    for record in manifest.shards:
        _check_size(folder, record)
    _check_hashes(folder, manifest.shards, again=True)
    for record in manifest.shards:
        _open_shard(folder, record, manifest)
    if not manifest.complete:
        raise ShardError(
            f"{folder} is incomplete: {len(manifest.shards)} of {manifest.n_shards or '?'} shards are there "
            "(and sound); run the harvest again to finish it"
        )
    return manifest


def info(path: str | Path) -> str:
    """A description of a set, for people: what it is, from where, how much, what was left out."""
    source = open_activations(path, allow_incomplete=True, verify="never")
    manifest = source.manifest if isinstance(source, ShardSet) else None
    rows = {
        "format": "aen-lightning shards" if manifest else "SAELens cached activations",
        **{f"hook {h}": f"d_in {d}" for h, d in source.d_in.items()},
        "dtype": str(source.dtype).removeprefix("torch."),
        "context_size": source.context_size,
        "tokens": f"{source.n_tokens:,}",
        **{
            k: v
            for k, v in source.metadata.items()
            if v is not None and k not in ("hook_name", "context_size")
        },
    }
    if manifest:
        rows |= {f"tokens {name}": f"{n:,}" for name, n in manifest.counts.items()}
        rows |= {f"filter {name}": value for name, value in manifest.filters.items()}
        rows["shards"] = f"{len(manifest.shards)} of {manifest.n_shards or '?'}"
        rows["size"] = human_size(sum(s.n_bytes for s in manifest.shards))
        rows["complete"] = "yes" if manifest.complete else "no: run the harvest again to finish it"
    width = max(map(len, rows))
    return printable("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))


def open_activations(
    path: str | Path, *, allow_incomplete: bool = False, verify: Verify = "once"
) -> ActivationSource:
    """Open a folder of activations, ours or SAELens's, told apart by what is in it.

    Raises:
        FileNotFoundError: If it is neither.
    """
    folder = Path(path)
    if (folder / MANIFEST_NAME).is_file():
        return ShardSet(folder, allow_incomplete=allow_incomplete, verify=verify)
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        return SAELensCache(folder)
    raise FileNotFoundError(
        f"{folder} holds no activations: neither our {MANIFEST_NAME} (aen harvest) nor a dataset that "
        "SAELens cached"
    )
