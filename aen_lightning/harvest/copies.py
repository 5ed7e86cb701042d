"""Copies from a device to the host that the device does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopies:
    """Copies tensors into pinned memory on a stream of their own, beside what the device computes on.

    On a device without streams a copy is an ordinary one.

    Args:
        device: Where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, tensor: Tensor) -> HostCopy:
        """Begin to copy; the tensor may be freed or changed by later work on the current stream."""
        if self._stream is None:
            return HostCopy(tensor.to("cpu"), None)
        ready = torch.cuda.current_stream(tensor.device)
        self._stream.wait_stream(ready)
        with torch.cuda.stream(self._stream):
            # pinned memory comes from torch's cache of it, which waits for the copies of freed buffers
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)
            done = torch.cuda.Event()
            done.record(self._stream)
        return HostCopy(host, done)


class HostCopy:
    """A copy under way."""

    def __init__(self, tensor: Tensor, done: torch.cuda.Event | None) -> None:
        self._tensor, self._done = tensor, done

    def wait(self) -> Tensor:
        """The tensor on the host; blocks this thread, and no stream, until it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensor
