"""Which shards were hashed, and what tells that they are still the same files: ``.verified.json``.

A stamp holds, beside hash, size and modification time, what only the system sets: the time of the last change
to the file, and its number. So a note that comes along with a set of somebody else fits no file here, and
neither does one whose shard was touched since.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import Field

from aen_lightning.files import write_json
from aen_lightning.files.checked import FileName, check
from aen_lightning.shards.manifest import (
    STAMP_KEY,
    ShardError,
    ShardRecord,
    file_inside,
    read_record,
    record_path,
)

STAMPS_NAME = ".verified.json"
Stamp: TypeAlias = list[str | int]
_Stamps: TypeAlias = dict[FileName, Annotated[Stamp, Field(max_length=8)]]


def stamp(folder: Path, record: ShardRecord) -> Stamp:
    """What a shard is known by while nobody changes it."""
    stat = (folder / record.file).stat()
    return [record.sha256, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def read_stamps(folder: Path) -> dict[str, Stamp]:
    """The stamps of the shards that were hashed, by file; none if there are no notes.

    Raises:
        ShardError: If the notes are damaged.
    """
    if not (folder / STAMPS_NAME).is_file():
        return {}
    path = file_inside(folder, STAMPS_NAME)
    try:
        return dict(check(_Stamps, read_record(path), path))
    except ValueError as error:
        raise ShardError(f"{error}; delete it: the shards are then hashed once more") from error


def write_stamps(folder: Path, stamps: Mapping[str, Stamp]) -> None:
    """Replace the notes."""
    write_json(folder / STAMPS_NAME, dict(stamps))


def is_stamped(folder: Path, record: ShardRecord, stamps: Mapping[str, Stamp]) -> bool:
    """Whether a shard is the file that was hashed."""
    return stamps.get(record.file) == stamp(folder, record)


def adopt_loose_stamps(folder: Path, records: Iterable[ShardRecord]) -> None:
    """Take the stamps that shards got when they were closed into the notes, and drop those of no shard."""
    before = read_stamps(folder)
    stamps = {r.file: before[r.file] for r in records if r.file in before}
    for record in records:
        path = record_path(folder, record.index)
        if path.is_file() and (own := read_record(path).get(STAMP_KEY)):
            stamps[record.file] = check(Stamp, own, path)
    if stamps != before:
        write_stamps(folder, stamps)
