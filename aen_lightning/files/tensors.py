"""safetensors files: headers, dtype names, and tensors too large to be in memory twice."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aen_lightning.files.whole import replacing, set_default_mode

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


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of a tensor.

    Its ``shape``, and its ``dtype`` by the format's name (``F32``, ``BF16``, ...).
    """

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
    """The beginning of a safetensors file, for files too large for safetensors to write: it takes tensors in
    memory only.

    Args:
        tensors: Dtype and shape of each, in the order in which their bytes follow.
        metadata: Strings to keep beside them.
        length: Bytes of the header, to replace one that is as long; None: as many as it needs.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
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


def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str | Path) -> None:
    """Refuse tensors that hold a nan or an infinity.

    Args:
        tensors: Name and tensor; those of whole numbers pass.
        where: What the message begins with.

    Raises:
        ValueError: For the first one; it is named.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 cannot be compared
        # many times faster than isfinite of all
        if not all(bool(extreme.isfinite()) for extreme in wide.aminmax()):
            n = int((~wide.isfinite()).sum())
            raise ValueError(
                f"{where}: {name} holds {n:,} of {tensor.numel():,} numbers that are not finite (nan or "
                "infinity): the training diverged, or the file is damaged"
            )


def require_finite_file(path: str | Path) -> None:
    """:func:`require_finite` for a safetensors file, a tensor at a time.

    Raises:
        ValueError: If it is no safetensors file, a damaged one, or holds a number that is not finite.
    """
    for name in read_safetensors_header(path):
        tensor = read_tensor(path, name)
        assert tensor is not None  # the header names it
        require_finite([(name, tensor)], path)


@contextmanager
def disk_errors_named(path: str | Path) -> Iterator[None]:
    """safetensors' errors of the system, such as a full disk, as ``OSError`` with the path; others as they are."""
    try:
        yield
    except SafetensorError as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write a safetensors file, whole or not at all, readable as the umask says. Returns the path."""
    path = Path(path)
    with replacing(path) as temporary, disk_errors_named(path):
        save_file(dict(tensors), temporary)
        set_default_mode(temporary)
    return path


_SLICE_BYTES = 1 << 25


@dataclass(frozen=True)
class Transposed:
    """A matrix that :func:`stream_tensors` writes transposed.

    Args:
        tensor: Shape (m, n); (n, m) on disk.
    """

    tensor: Tensor


def stream_tensors(path: str | Path, tensors: Mapping[str, Tensor | Transposed]) -> Path:
    """Write floating-point tensors that should not be in memory twice, whole or not at all. Returns the path.

    safetensors's own ``save_file`` wants every tensor contiguous and in memory. Here two copies of a slice of
    32 MB are, and of a mapped source the pages that were read.

    Args:
        path: The safetensors file.
        tensors: By name; none is empty.

    Raises:
        ValueError: For a tensor with numbers that are not finite; it is named.
    """
    path = Path(path)
    views = {name: item.tensor.T if isinstance(item, Transposed) else item for name, item in tensors.items()}
    header = {name: (view.dtype, tuple(view.shape)) for name, view in views.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(safetensors_header(header, {"format": "pt"}))
        for name, item in tensors.items():
            for piece in _slices(item):
                # many times faster than isfinite of all
                if not all(bool(extreme.isfinite()) for extreme in piece.aminmax()):
                    raise ValueError(
                        f"{name} holds numbers that are not finite: the checkpoint is damaged or diverged"
                    )
                file.write(piece.view(torch.uint8).numpy().data)
    return path


def _slices(item: Tensor | Transposed) -> Iterator[Tensor]:
    if not isinstance(item, Transposed):
        yield item.detach().contiguous().flatten()
        return
    tensor = item.tensor.detach()
    columns = max(1, _SLICE_BYTES // (tensor.shape[0] * tensor.element_size()))
    for start in range(0, tensor.shape[1], columns):
        # first gathered, then turned: torch turns a whole matrix five times faster than a part of one
        yield tensor[:, start : start + columns].contiguous().T.contiguous()
