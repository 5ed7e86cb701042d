"""What a set of activation shards is: the records that ``manifest.json`` holds."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aen_lightning.files import DTYPES, read_json, write_json

FORMAT = "aen-lightning-activations"
VERSION = 1
MANIFEST_NAME = "manifest.json"


class ShardError(ValueError):
    """A set of shards that is damaged, incomplete, or not what the caller takes it for. Names the file."""


@dataclass(frozen=True)
class ShardRecord:
    """One shard.

    Args:
        index: Place in the set, from 0.
        file: Name inside the folder.
        n_tokens: Rows, after filters.
        n_bytes: Size of the file.
        sha256: Of the whole file, hexadecimal.
        counts: Tokens of the text behind it, by fate: ``read``, ``special``, ``outlier``,
            ``non_finite``; may be empty.
    """

    index: int
    file: str
    n_tokens: int
    n_bytes: int
    sha256: str
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Manifest:
    """Contents of ``manifest.json``.

    Args:
        d_in: Width of the activation at each hook point, keyed by ``hook_name``; the order is that inside the
            shards.
        dtype: On disk: ``float32``, ``bfloat16`` or ``float16``.
        context_size: Tokens the language model saw at once.
        metadata: Where the activations are from, in SAELens's metadata keys (``model_name``, ``revision``,
            ...).
        filters: Which tokens were left out.
        settings: Everything that decides which rows the set holds; a run that continues must agree with it.
        plan: Work that the set takes (rows of tokens in each shard, ids left out); empty if it was not
            harvested.
        n_shards: How many shards the finished set has; None while that is not known.
        complete: Whether all of them are there.
        shards: Records in order of ``index``.
    """

    d_in: dict[str, int]
    dtype: str
    context_size: int
    metadata: dict[str, Any] = field(default_factory=dict)
    filters: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    n_shards: int | None = None
    complete: bool = False
    shards: list[ShardRecord] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        """Rows in all shards listed."""
        return sum(s.n_tokens for s in self.shards)

    @property
    def bytes_per_token(self) -> int:
        """On disk: activations of all hook points and the token id."""
        return sum(self.d_in.values()) * DTYPES[self.dtype].itemsize + 4

    @property
    def counts(self) -> dict[str, int]:
        """Sum of the shards' counts."""
        total: dict[str, int] = {}
        for shard in self.shards:
            for name, n in shard.counts.items():
                total[name] = total.get(name, 0) + n
        return total

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest atomically."""
        content = {"format": FORMAT, "version": VERSION} | asdict(self)
        write_json(folder / MANIFEST_NAME, content | {"n_tokens": self.n_tokens, "counts": self.counts})

    @classmethod
    def read(cls, folder: Path, *, with_loose_records: bool = False) -> Manifest:
        """Read a folder's manifest.

        Args:
            folder: Of the set.
            with_loose_records: Also count shards that are in place but not listed yet (a harvest that runs or
                was cut off).

        Raises:
            FileNotFoundError: If there is none.
            ShardError: If it is not one of ours, is damaged, or of a later version.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {MANIFEST_NAME}: it is not a set of activation shards"
            )
        content = read_record(path)
        if content.get("format") != FORMAT:
            raise ShardError(
                f"{path} is not a manifest of activations: its format is {content.get('format')!r}, not "
                f"{FORMAT!r}"
            )
        if content.get("version") != VERSION:
            raise ShardError(
                f"{path} has format version {content.get('version')!r}; this aen-lightning reads {VERSION}: "
                "update the package"
            )
        try:
            records = [ShardRecord(**s) for s in content["shards"]]
            known = {k: content[k] for k in cls.__dataclass_fields__ if k != "shards"}
            manifest = cls(shards=records, **known)
        except (KeyError, TypeError) as e:
            raise ShardError(f"{path} is damaged: {e}") from e
        if manifest.dtype not in DTYPES:
            raise ShardError(f"{path} has dtype {manifest.dtype!r}, expected one of {', '.join(DTYPES)}")
        if with_loose_records:
            listed = {s.index for s in manifest.shards}
            loose = [r for r in loose_records(folder) if r.index not in listed]
            manifest.shards = sorted([*manifest.shards, *loose], key=lambda s: s.index)
        return manifest


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.safetensors"


def record_path(folder: Path, index: int) -> Path:
    """Where the record of a shard waits until the manifest lists it."""
    return folder / f"shard-{index:05d}.json"


def loose_records(folder: Path) -> list[ShardRecord]:
    """Records beside the manifest whose shards are in place, in order."""
    records = [ShardRecord(**read_record(p)) for p in sorted(folder.glob("shard-*.json"))]
    return [r for r in records if (folder / r.file).is_file()]


def read_record(path: Path) -> dict[str, Any]:
    """Read one of a set's JSON files.

    Raises:
        ShardError: If it is damaged.
    """
    try:
        return read_json(path)
    except ValueError as error:
        raise ShardError(f"{error}; it is damaged") from error


def require_disk(folder: Path, n_bytes: int, *, force: bool = False) -> None:
    """Refuse to begin what does not fit on the disk.

    Args:
        folder: Where it will be written; it need not exist yet.
        n_bytes: How much more will be written.
        force: Only check that the folder can be looked up.

    Raises:
        ShardError: If less is free.
    """
    existing = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if n_bytes > free and not force:
        raise ShardError(
            f"{folder} needs {n_bytes / 2**30:.2f} GiB more and its disk has {free / 2**30:.2f} GiB free: "
            "take fewer tokens, a 16-bit dtype or another disk, or force it (force_disk: true)"
        )
