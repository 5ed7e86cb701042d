"""Writing shards: row by row as they come, whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from aen_lightning.files import DTYPES, put_in_place, safetensors_header, temporary_beside, write_json
from aen_lightning.shards.manifest import (
    MANIFEST_NAME,
    STAMP_KEY,
    Manifest,
    ShardError,
    ShardRecord,
    loose_records,
    record_path,
    shard_name,
)
from aen_lightning.shards.stamps import adopt_loose_stamps, stamp

_COPY_BYTES = 1 << 24


class ShardStream:
    """One shard, appended to batch by batch, so that memory holds a batch and never a shard.

    The safetensors library writes only tensors that are in memory whole. Here the header is written for the
    most rows there can be, rows go straight to their place in the file, and if filters left fewer the tensors
    are moved together at the end.

    Args:
        folder: Of the set; must exist.
        index: Place of the shard in the set.
        d_in: Width at each hook point, keyed by name.
        dtype: On disk.
        capacity: The most rows that will be appended.
    """

    def __init__(self, folder: Path, index: int, d_in: Mapping[str, int], dtype: str, capacity: int) -> None:
        self.folder, self.index, self.d_in, self.dtype, self.capacity = (
            folder,
            index,
            dict(d_in),
            dtype,
            capacity,
        )
        self.n_tokens = 0
        self.counts: dict[str, int] = {}
        # int32 first: whatever n_tokens is, every tensor then begins at a multiple of its element size
        self._row_bytes = {"token_ids": 4} | {h: d * DTYPES[dtype].itemsize for h, d in self.d_in.items()}
        self._header = self._make_header(capacity)
        self._temporary = temporary_beside(folder / shard_name(index))
        self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._starts = self._tensor_starts(capacity)

    def _make_header(self, n: int, length: int | None = None) -> bytes:
        tensors = {"token_ids": (torch.int32, (n,))} | {
            h: (DTYPES[self.dtype], (n, d)) for h, d in self.d_in.items()
        }
        return safetensors_header(tensors, {"format": "pt", "shard": str(self.index)}, length=length)

    def _tensor_starts(self, n: int) -> dict[str, int]:
        starts, offset = {}, len(self._header)
        for name, row_bytes in self._row_bytes.items():
            starts[name] = offset
            offset += n * row_bytes
        return starts

    def append(self, activations: Mapping[str, Tensor], token_ids: Tensor) -> None:
        """Append rows.

        Args:
            activations: For each hook point (n, d_in), on any device, cast to the dtype on disk if they have
                another.
            token_ids: (n,).

        Raises:
            ValueError: If shapes or hook points do not fit, or there are more rows than the capacity.
        """
        n = len(token_ids)
        if set(activations) != set(self.d_in):
            raise ValueError(
                f"shard {self.index} holds hook points {sorted(self.d_in)}, got {sorted(activations)}"
            )
        if self.n_tokens + n > self.capacity:
            raise ValueError(
                f"shard {self.index} has room for {self.capacity} tokens, got {self.n_tokens + n}"
            )
        for hook, x in activations.items():
            if x.shape != (n, self.d_in[hook]):
                raise ValueError(
                    f"activations of {hook!r} must have shape {(n, self.d_in[hook])} beside {n} token ids, "
                    f"got {tuple(x.shape)}"
                )
            self._write(hook, x.to("cpu", DTYPES[self.dtype]))
        self._write("token_ids", token_ids.to("cpu", torch.int32))
        self.n_tokens += n

    def _write(self, name: str, rows: Tensor) -> None:
        if len(rows):
            view = rows.detach().contiguous().view(torch.uint8).numpy().data.cast("B")
            _pwrite(self._fd, view, self._starts[name] + self.n_tokens * self._row_bytes[name])

    def count(self, **counts: int) -> None:
        """Add to the counts kept in the record."""
        for name, n in counts.items():
            self.counts[name] = self.counts.get(name, 0) + n

    def close(self) -> ShardRecord:
        """Finish: after this the shard exists, and so does its record."""
        return self.finish_writing()()

    def finish_writing(self) -> Callable[[], ShardRecord]:
        """Write what is left to write; the result, once called, hashes the file, which takes about as long as writing
        it did, and makes shard and record exist. It may be called in another thread."""
        n, length = self.n_tokens, len(self._header)
        starts = self._tensor_starts(n)
        for name in self._row_bytes if n < self.capacity else ():
            _move_down(self._fd, self._starts[name], starts[name], n * self._row_bytes[name])
        n_bytes = len(self._header) + n * sum(self._row_bytes.values())
        _pwrite(self._fd, memoryview(self._make_header(n, length)), 0)
        os.ftruncate(self._fd, n_bytes)
        os.close(self._fd)
        self._fd = -1

        def seal() -> ShardRecord:
            with self._temporary.open("rb") as f:
                sha256 = hashlib.file_digest(f, "sha256").hexdigest()
            put_in_place(self._temporary, self.folder / shard_name(self.index))
            record = ShardRecord(self.index, shard_name(self.index), n, n_bytes, sha256, self.counts)
            # hashed just now: what the file is known by is kept with its record, and nobody need hash it again
            write_json(
                record_path(self.folder, self.index),
                record.__dict__ | {STAMP_KEY: stamp(self.folder, record)},
            )
            return record

        return seal

    def abort(self) -> None:
        """Leave nothing behind. Harmless after ``close``."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._temporary.unlink(missing_ok=True)


def _pwrite(fd: int, view: memoryview, offset: int) -> None:
    while len(view):  # one call writes at most 2 GiB
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def _move_down(fd: int, source: int, target: int, n_bytes: int) -> None:
    if source == target:
        return
    for at in range(0, n_bytes, _COPY_BYTES):
        chunk = os.pread(fd, min(_COPY_BYTES, n_bytes - at), source + at)
        _pwrite(fd, memoryview(chunk), target + at)


class ShardFolder:
    """The folder of a set while it is written, by one process or several.

    Each process writes shards and their records; one process (rank 0) begins the folder, and finishes it once
    all are done.

    Args:
        path: Folder; made if missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def begin(self, manifest: Manifest) -> Manifest:
        """Start a set, or continue one that was cut off: rank 0, before any process writes.

        Args:
            manifest: Of the set to be; its ``settings`` decide whether a set that is there is the same one.

        Returns:
            The manifest on disk, with the shards that are done.

        Raises:
            ShardError: If the folder holds another set.
            FileExistsError: If the folder holds other things.
        """

        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / MANIFEST_NAME).exists():
            leftovers = [p.name for p in self.path.iterdir() if not p.name.endswith(".tmp")]
            if leftovers:
                raise FileExistsError(
                    f"{self.path} holds {sorted(leftovers)[:3]} and no manifest: give an empty or new folder"
                )
            manifest.write(self.path)
        there = Manifest.read(self.path)
        wanted = manifest.settings_on_disk()
        different = [k for k in sorted({*wanted, *there.settings}) if wanted.get(k) != there.settings.get(k)]
        if different:
            said = "; ".join(f"{k} was {there.settings.get(k)!r}, now {wanted.get(k)!r}" for k in different)
            raise ShardError(
                f"{self.path} holds another set of activations ({said}): give another folder or the same "
                "settings"
            )
        for temporary in self.path.rglob(".*.tmp"):
            temporary.unlink(missing_ok=True)
        return self.collect()

    def collect(self, *, complete: bool | None = None) -> Manifest:
        """Take loose records into the manifest.

        Args:
            complete: Mark the set as finished (or not); None leaves the mark.

        Raises:
            ShardError: If it is to be marked finished and shards are missing.
        """

        manifest = Manifest.read(self.path, with_loose_records=True)
        there = [s for s in manifest.shards if (self.path / s.file).is_file()]
        manifest.complete = manifest.complete and len(there) == len(manifest.shards)
        manifest.shards = there
        if complete:
            manifest.n_shards = len(manifest.shards) if manifest.n_shards is None else manifest.n_shards
            missing = sorted(set(range(manifest.n_shards)) - {s.index for s in manifest.shards})
            if missing:
                raise ShardError(
                    f"{self.path} lacks {len(missing)} of {manifest.n_shards} shards, e.g. "
                    f"{shard_name(missing[0])}"
                )
        if complete is not None:
            manifest.complete = complete
        manifest.write(self.path)
        adopt_loose_stamps(self.path, manifest.shards)
        for record in loose_records(self.path):
            record_path(self.path, record.index).unlink()
        return manifest
