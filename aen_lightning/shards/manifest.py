"""What a set of activation shards is: the records that ``manifest.json`` holds."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from aen_lightning.files import DTYPES, ModelDtype, human_size, read_json, write_json
from aen_lightning.files.checked import OUR_RECORD, Count, FileName, Flag, Size, Word, check
from aen_lightning.files.redaction import without_secrets
from aen_lightning.saes.metadata import Metadata

FORMAT = "aen-lightning-activations"
VERSION = 1
MANIFEST_NAME = "manifest.json"


_MAX_HEADER_BYTES = 100 * 10**6  # safetensors reads no longer one
STAMP_KEY = "stamp"
"""In a loose record: what tells that the shard is still the one that was hashed."""
_DERIVED = ("format", "version", "n_tokens", "counts")


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

    __pydantic_config__: ClassVar[ConfigDict] = OUR_RECORD

    index: Annotated[int, Field(ge=0, le=10**7, strict=True)]
    file: FileName
    n_tokens: Count
    n_bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$", strict=True)]
    counts: dict[Word, Count] = field(default_factory=dict)


class HarvestPlan(TypedDict, total=False):
    """``plan`` of a manifest: work orders, so that a harvest that was cut off makes the same shards."""

    __pydantic_config__ = OUR_RECORD  # type: ignore[misc]

    rows_per_shard: Size
    rows: list[Count]
    exclude_token_ids: list[int]


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

    __pydantic_config__: ClassVar[ConfigDict] = OUR_RECORD

    d_in: Annotated[dict[Word, Size], Field(min_length=1)]
    dtype: ModelDtype
    context_size: Size
    metadata: dict[str, Any] = field(default_factory=dict)
    filters: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    plan: HarvestPlan = field(default_factory=HarvestPlan)
    n_shards: Count | None = None
    complete: Flag = False
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

    def sae_metadata(self) -> dict[str, Any]:
        """``metadata`` and which tokens were left out: what a dictionary trained on this set should say."""
        left_out: dict[str, Any] = {}
        if "norm_outlier_multiple" in self.filters:
            left_out["norm_outlier_multiple"] = self.filters["norm_outlier_multiple"]
        if self.filters.get("exclude_token_ids") and "exclude_token_ids" in self.plan:
            left_out["exclude_special_tokens"] = self.plan["exclude_token_ids"]
        return self.metadata | left_out

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest atomically; no secret gets into it."""
        body = asdict(self) | {
            name: without_secrets(getattr(self, name)) for name in ("metadata", "settings")
        }
        content = {"format": FORMAT, "version": VERSION} | body
        write_json(folder / MANIFEST_NAME, content | {"n_tokens": self.n_tokens, "counts": self.counts})

    def settings_on_disk(self) -> dict[str, Any]:
        """``settings`` as they come back from disk: without secrets, tuples as lists."""
        return dict(json.loads(json.dumps(without_secrets(self.settings))))

    @classmethod
    def read(cls, folder: Path, *, with_loose_records: bool = False) -> Manifest:
        """Read a folder's manifest.

        Args:
            folder: Of the set.
            with_loose_records: Also count shards that are in place but not listed yet (a harvest that runs or
                was cut off).

        Raises:
            FileNotFoundError: If there is none.
            ShardError: If it is not one of ours, is damaged, contradicts itself, or is of a later version.
        """
        if not (folder / MANIFEST_NAME).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {MANIFEST_NAME}: it is not a set of activation shards"
            )
        path = file_inside(folder, MANIFEST_NAME)
        content = read_record(path)
        if content.get("format") != FORMAT:
            raise ShardError(
                f"{path} is not a manifest of activations: its format is {str(content.get('format'))[:60]!r}, "
                f"not {FORMAT!r}"
            )
        if content.get("version") != VERSION:
            raise ShardError(
                f"{path} has format version {str(content.get('version'))[:60]}; this aen-lightning reads "
                f"{VERSION}: update the package"
            )
        body = {key: value for key, value in content.items() if key not in _DERIVED}
        try:
            manifest = check(cls, body, path)
            check(Metadata, manifest.sae_metadata(), f"{path}: metadata")
        except ValueError as error:
            raise ShardError(f"{error}; it is damaged, or no manifest of ours") from error
        _require_consistent(manifest, path)
        if content.get("n_tokens", manifest.n_tokens) != manifest.n_tokens:
            raise ShardError(
                f"{path} is damaged: n_tokens is {str(content['n_tokens'])[:60]}, and its shards have "
                f"{manifest.n_tokens} together"
            )
        if with_loose_records:
            listed = {s.index for s in manifest.shards}
            loose = [r for r in loose_records(folder) if r.index not in listed]
            manifest.shards = sorted([*manifest.shards, *loose], key=lambda s: s.index)
            _require_consistent(manifest, path)
        return manifest


def _require_consistent(manifest: Manifest, path: Path) -> None:
    """Refuse what no harvest writes: a shard twice, one too many, more rows than its bytes can hold.

    With the sizes of the files (:class:`~aen_lightning.shards.read.ShardSet` compares them) this bounds every
    number that memory is set aside for.
    """
    indices = [record.index for record in manifest.shards]
    for at, record in enumerate(manifest.shards):
        if record.file != shard_name(record.index):
            raise ShardError(
                f"{path} is damaged: shards[{at}].file is {record.file!r}, and shard {record.index} is "
                f"{shard_name(record.index)!r}"
            )
        header = record.n_bytes - record.n_tokens * manifest.bytes_per_token
        if not 8 <= header <= _MAX_HEADER_BYTES:
            raise ShardError(
                f"{path} is damaged: {record.file} has {record.n_bytes} bytes and {record.n_tokens} tokens of "
                f"{manifest.bytes_per_token} bytes, which cannot both be"
            )
    if indices != sorted(set(indices)):
        twice = next((i for i in indices if indices.count(i) > 1), None)
        what = "its shards are not in order" if twice is None else f"it lists {shard_name(twice)} twice"
        raise ShardError(f"{path} is damaged: {what}")
    n = manifest.n_shards
    if n is not None and indices and indices[-1] >= n:
        raise ShardError(f"{path} is damaged: n_shards is {n}, and it lists {shard_name(indices[-1])}")
    if manifest.complete:
        missing = next((i for i, index in enumerate(indices) if i != index), len(indices))
        if missing < (len(indices) if n is None else n):
            raise ShardError(
                f"{path} is damaged: it says that all {n or ''} shards are there, and does not list "
                f"{shard_name(missing)}"
            )


def file_inside(folder: Path, name: str) -> Path:
    """``folder / name``, unless it is a link to somewhere else.

    A link may stay in the folder, or lead to the ``blobs`` of huggingface_hub's cache that the folder lies in.

    Raises:
        ShardError: If it leads anywhere else.
    """
    path = folder / name
    if path.is_symlink():
        home, target = folder.resolve(), path.resolve()
        caches = [up.parent / "blobs" for up in (home, *home.parents) if up.name == "snapshots"]
        if not any(target.is_relative_to(allowed) for allowed in (home, *caches)):
            raise ShardError(f"{path} is a link to {target}, outside of the set: copy the file itself there")
    return path


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.safetensors"


def record_path(folder: Path, index: int) -> Path:
    """Where the record of a shard waits until the manifest lists it."""
    return folder / f"shard-{index:05d}.json"


def loose_records(folder: Path) -> list[ShardRecord]:
    """Records beside the manifest whose shards are in place, in order.

    Raises:
        ShardError: If one is damaged.
    """
    records = []
    for path in sorted(folder.glob("shard-*.json")):
        content = read_record(file_inside(folder, path.name))
        content.pop(STAMP_KEY, None)
        try:
            record = check(ShardRecord, content, path)
        except ValueError as error:
            raise ShardError(f"{error}; it is damaged") from error
        if path != record_path(folder, record.index):
            raise ShardError(f"{path} is the record of shard {record.index}: it is damaged")
        if (folder / record.file).is_file():
            records.append(record)
    return sorted(records, key=lambda record: record.index)


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
            f"{folder} needs {human_size(n_bytes)} more and its disk has {human_size(free)} free: "
            "take fewer tokens, a 16-bit dtype or another disk, or force it (force_disk: true)"
        )
