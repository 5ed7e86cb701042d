"""Writing a safetensors file in slices, transposed on the way, for weights that should not be in memory twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SLICE_BYTES = 1 << 25


@dataclass(frozen=True)
class Transposed:
    """A matrix to be written transposed.

    Args:
        tensor: Shape (m, n); (n, m) on disk.
    """

    tensor: Tensor


def write_safetensors(path: Path, tensors: Mapping[str, Tensor | Transposed]) -> None:
    """Write floating-point tensors; the file appears when it is whole.

    safetensors's own ``save_file`` wants every tensor contiguous and in memory. Here two copies of a slice of 32 MB are, and of a
    mapped source the pages that were read.

    Args:
        path: The file.
        tensors: By name; none is empty.

    Raises:
        ValueError: For a tensor with numbers that are not finite; it is named.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, item in tensors.items():
        tensor = _view(item)
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, item in tensors.items():
                for piece in _slices(item):
                    if not all(
                        bool(end.isfinite()) for end in piece.aminmax()
                    ):  # many times faster than isfinite of all
                        raise ValueError(
                            f"{name} holds numbers that are not finite: the checkpoint is damaged or diverged"
                        )
                    file.write(piece.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _view(item: Tensor | Transposed) -> Tensor:
    return item.tensor.detach().T if isinstance(item, Transposed) else item.detach()


def _slices(item: Tensor | Transposed) -> Iterator[Tensor]:
    tensor = item.tensor.detach() if isinstance(item, Transposed) else item.detach()
    if not isinstance(item, Transposed):
        yield tensor.contiguous().flatten()
        return
    columns = max(1, _SLICE_BYTES // (tensor.shape[0] * tensor.element_size()))
    for start in range(0, tensor.shape[1], columns):
        # first gathered, then turned: torch turns a whole matrix five times faster than a part of one
        yield tensor[:, start : start + columns].contiguous().T.contiguous()
