"""Checkpoints that are whole or not there: how they are written and checked, and which one a run goes on from."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from aen_lightning.files import human_size, replacing

_PREFIX = b"aen-sha256:"
_COMMENT_BYTES = len(_PREFIX) + 64


class CheckpointError(ValueError):
    """A checkpoint that is damaged, was cut off, or holds what a run must not go on from."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole or not at all, with a checksum that is looked at before reading.

    Written beside the target, synced, renamed: Lightning's own writer goes through the temporary folder, which may be on
    another file system, and then a full disk or a kill leaves a torn file under the checkpoint's name. The SHA-256 is in
    the comment of the zip archive that ``torch.save`` writes, so it travels with the file and everything that reads
    such files reads it still. Addresses (``s3://...``) go Lightning's way.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """See base class."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            with temporary.open("wb") as file:
                hashing = _Hashing(file)
                try:
                    torch.save(checkpoint, hashing)  # type: ignore[arg-type]  # only write and flush are called
                except RuntimeError as error:  # torch's, of its archive, which says nothing of the disk
                    if hashing.error is None:
                        raise
                    free = human_size(shutil.disk_usage(path.parent).free)
                    raise OSError(
                        hashing.error.errno,
                        f"{hashing.error.strerror}: the checkpoint is not written, {free} are free on its disk; older "
                        "ones are as they were. Make room, and go on with --resume auto",
                        str(path),
                    ) from error
                comment = _PREFIX + hashing.digest.hexdigest().encode()
                file.write(comment)
            with temporary.open("r+b") as file:  # the archive's last field is the length of its comment
                file.seek(-len(comment) - 2, 2)
                file.write(len(comment).to_bytes(2, "little"))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See base class.

        Raises:
            CheckpointError: If the file is damaged.
        """
        if "://" not in str(path) and Path(path).is_file():
            require_whole(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)


class _Hashing:
    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, piece: Any) -> int:
        self.digest.update(piece)
        try:
            return self.file.write(piece)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def require_whole(path: Path) -> None:
    """Check a checkpoint against its checksum; one of another writer, which has none, against the archive's CRC-32.

    Raises:
        CheckpointError: If it is no checkpoint, was cut off, or has a byte that is not as it was written.
    """
    stat = path.stat()
    if problem := _problem(str(path.resolve()), stat.st_size, stat.st_mtime_ns):
        raise CheckpointError(f"{path} {problem}: resume from another one, or give --resume auto")


@lru_cache(maxsize=64)  # looked at when it is chosen and again when it is read
def _problem(path: str, size: int, mtime_ns: int) -> str | None:
    with Path(path).open("rb") as file:
        file.seek(max(0, size - _COMMENT_BYTES))
        comment = file.read()
        if comment.startswith(_PREFIX):
            file.seek(0)
            digest = _digest(file, size - _COMMENT_BYTES - 2)
            digest.update(b"\0\0")  # the length of the comment before there was one
            same = digest.hexdigest().encode() == comment[len(_PREFIX) :]
            file.seek(size - _COMMENT_BYTES - 2)
            same = same and file.read(2) == _COMMENT_BYTES.to_bytes(2, "little")
            return None if same else "is damaged: its checksum does not fit"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.comment:
                return "is damaged: its checksum cannot be read"
            broken = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError):
        return "is no checkpoint, or was cut off while it was written"
    return None if broken is None else f"is damaged: {broken} in it does not fit its CRC"


def _digest(file: IO[bytes], n_bytes: int) -> Any:
    digest = hashlib.sha256()
    while n_bytes > 0 and (piece := file.read(min(n_bytes, 1 << 22))):
        digest.update(piece)
        n_bytes -= len(piece)
    return digest


def is_whole(path: Path) -> bool:
    """Whether a run can go on from a checkpoint: a file as :func:`require_whole`, a folder (sharded) with its index."""
    if path.is_dir():
        return (path / ".metadata").is_file() and (path / "meta.pt").is_file()
    try:
        require_whole(path)
    except (CheckpointError, FileNotFoundError):
        return False
    return True


def newest_whole(paths: Iterable[Path]) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that is whole, and the newer ones that are not."""
    damaged: list[Path] = []
    for path in sorted(paths, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        if is_whole(path):
            return path, damaged
        damaged.append(path)
    return None, damaged
