"""Files written whole or not at all, and JSON."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_TEXT_BYTES = 256 * 10**6
"""Of a JSON or YAML file that is read; the largest of ours, ``evaluation.json`` with a million features, has
some 50 MB."""


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary file beside ``path``, which takes its place when the block ends and is removed if it
    raises.

    So a reader sees the old file or the new one, never a part; also after a power cut, if ``durable``.

    Args:
        path: The file; its folder must exist.
        durable: Wait until the content and its name are on the disk.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        put_in_place(temporary, path, durable=durable)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """Where a file is written before it gets its name.

    Hidden, in the same folder, another one for each process.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def put_in_place(temporary: Path, path: Path, *, durable: bool = True) -> None:
    """Give a finished file its name; see :func:`replacing`."""
    if durable:
        _sync(temporary)
    temporary.replace(path)
    if durable:
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_default_mode(path: str | Path) -> None:
    """Give a file the permissions of any new file of this process: 0666 less the umask.

    safetensors and ``tempfile`` make files that only their owner may read (0600), whatever the umask says.
    """
    path = Path(path)
    probe = path.with_name(f".{path.name}.{os.getpid()}.mode")
    probe.touch()  # asking for the umask would mean to set it, for all threads
    try:
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink()


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file, whole or not at all; its folder is made. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON, whole or not at all. Returns the path.

    Raises:
        ValueError: If it holds a nan or an infinity, which JSON has not; the message names the file.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            f"{path} is not written: it would hold a nan or an infinity, which JSON has not"
        ) from error
    return write_text(path, text + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is not a JSON object, is larger than 256 MB, nested beyond measure, or holds a whole
            number of more than 64 bits or half a surrogate pair; the message names the file.
    """
    path = Path(path)
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        raise ValueError(
            f"{path} has {human_size(size)}, and no JSON of ours has more than {human_size(MAX_TEXT_BYTES)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, parse_int=_int_of_64_bits)
        if "\\ud" in text.lower():  # the escape of half a pair; alone it is no text, and cannot be printed
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} holds half of a surrogate pair, which is no text") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be JSON of ours") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def _int_of_64_bits(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**64:
        raise ValueError(f"the whole number {digits[:20]}... needs more than 64 bits")
    return value


def human_size(n_bytes: float) -> str:
    """``4.3 GB``: powers of ten."""
    size = float(n_bytes)
    for suffix in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {suffix}" if suffix == "B" else f"{size:.1f} {suffix}"
        size /= 1000
    return f"{size:.1f} TB"
