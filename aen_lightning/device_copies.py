"""Copies between a device and the host for which nobody waits until the copy is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A tensor on its way to the host.

    Args:
        tensor: What to copy, as it is when the present stream gets here.
        stream: A stream of the copy's own, beside what the device computes; None: the present one.
    """

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        tensor = tensor.detach()
        self._done: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor.to("cpu", copy=True)
            return
        # pinned memory comes from torch's cache of it, which waits for the copies of buffers that were freed
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        present = torch.cuda.current_stream(tensor.device)
        if stream is not None:
            stream.wait_stream(present)
            tensor.record_stream(stream)
        with torch.cuda.stream(stream or present):
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> Tensor:
        """The tensor on the host; blocks this thread, and no stream, until it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self._host

    def numbers(self) -> Any:
        """As :meth:`wait`, as a Python number, or nested lists of them."""
        return self.wait().numpy().tolist()


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for copies from ``device``, if it has streams."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def pinned(tensor: Tensor) -> Tensor:
    """The tensor in memory from which a GPU can fetch it by itself; as it is where there is no GPU."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
