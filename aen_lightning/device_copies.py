"""Copies between a device and the host for which nobody waits until the copy is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A tensor on its way to the host; one that is there already is not copied.

    Args:
        tensor: What to copy, as it is when the present stream gets here.
        stream: A stream of the copy's own, beside what the device computes; None: the present one.
    """

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        tensor = tensor.detach()
        self._done: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor.cpu()
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


class DeviceCopy:
    """A tensor on its way to a device, and what is done with it there first.

    Args:
        tensor: On the host; pinned, for the copy to run by itself.
        device: Where to.
        stream: A stream of the copy's own; None for a device without streams.
        then: Applied on the device, on that stream.
    """

    def __init__(
        self,
        tensor: Tensor,
        device: torch.device,
        stream: torch.cuda.Stream | None,
        then: Callable[[Tensor], Tensor],
    ) -> None:
        self._done: torch.cuda.Event | None = None
        with torch.cuda.stream(stream):
            self._tensor = then(tensor.to(device, non_blocking=True))
            if stream is not None:
                self._done = torch.cuda.Event()
                self._done.record()

    def take(self) -> Tensor:
        """The result, for the present stream, which waits for it; the host does not."""
        if self._done is not None:
            present = torch.cuda.current_stream(self._tensor.device)
            present.wait_event(self._done)
            self._tensor.record_stream(present)
        return self._tensor


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for copies from ``device``, if it has streams."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
