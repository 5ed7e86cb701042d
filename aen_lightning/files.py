"""Files: written whole or not at all, JSON, dtype names, and the headers of safetensors files. Each is here once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

ModelDtype = Literal["float32", "bfloat16", "float16"]
"""Names of the dtypes that a language model computes in and that activations are stored in."""

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SAFETENSORS_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary file beside ``path``, which takes its place when the block ends and is removed if it raises.

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
    """Where a file is written before it gets its name: hidden, in the same folder, another one for each process."""
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
        ValueError: If it holds a nan or an infinity, which JSON has not.
    """
    return write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is not a JSON object; the message names the file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of a tensor: its ``shape``, and its ``dtype`` by the format's name (``F32``, ``BF16``, ...)."""

    shape: tuple[int, ...]
    dtype: str


def read_safetensors_header(path: str | Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes in a safetensors file; no weight is read.

    Raises:
        ValueError: If it is no safetensors file, or a damaged one; the message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # safe_open is no dict
            return {name: TensorInfo(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one: {error}") from error


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    length: int | None = None,
) -> bytes:
    """The beginning of a safetensors file, for files too large for safetensors to write: it takes tensors in memory only.

    Args:
        tensors: Dtype and shape of each, in the order in which their bytes follow.
        metadata: Strings to keep beside them.
        length: Bytes of the header, to replace one that is as long; None: as many as it needs.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = -(-len(text) // 8) * 8 if length is None else length - 8  # tensors begin at a multiple of 8
    return padded.to_bytes(8, "little") + text.ljust(padded)


def read_tensor(path: str | Path, name: str) -> torch.Tensor | None:
    """One tensor of a safetensors file, or None if it has none of that name; the rest is not read.

    Raises:
        ValueError: If it is no safetensors file, or a damaged one; the message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one: {error}") from error
