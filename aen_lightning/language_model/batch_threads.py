"""Runs a function on parts of a batch side by side on the cores of a CPU.

Where one operation after the other is split over the cores, each ends when its slowest core does. Parts of a
batch that are each run from end to end by cores of their own wait for each other once a batch. On a GPU there
is nothing to gain.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

MIN_TOKENS = 512
"""Fewer tokens than this a part make matrices on which a core is slow."""

T = TypeVar("T")


class BatchThreads:
    """Threads of Python, each with its share of the threads that torch has when they are first used.

    Autograd and inference mode and CPU autocast are as in the calling thread; gradients do not flow back
    through it, random numbers are not reproducible in it.

    Args:
        min_tokens: Elements of (rows, context) that a part has at least.
    """

    def __init__(self, min_tokens: int = MIN_TOKENS) -> None:
        self.min_tokens = min_tokens
        self._pool: ThreadPoolExecutor | None = None
        self._pool_is_for = (0, 0)  # parts, threads of torch in all

    def n_parts(self, tokens: Tensor) -> int:
        """Into how many parts a batch (rows, context) is to be cut: as many as there are threads, if it is
        large enough."""
        return max(1, min(len(tokens), tokens.numel() // self.min_tokens, torch.get_num_threads()))

    def map(self, function: Callable[..., T], n_parts: int, *tensors: Tensor | None) -> list[T]:
        """``function`` of each part of the tensors, in order.

        Args:
            function: Called with a part of each tensor, or None where that is None; several calls run at a
                time.
            n_parts: Number of parts, of equal size to within a row.
            *tensors: Each with the rows as its first dimension.

        Raises:
            Exception: What ``function`` raised first, once every part has ended.
        """
        parts: list[Sequence[Tensor | None]] = [
            [None] * n_parts if x is None else x.tensor_split(n_parts) for x in tensors
        ]
        call = _in_the_same_mode(function)
        pool = self._threads(n_parts)
        futures = [pool.submit(call, *arguments) for arguments in zip(*parts, strict=True)]
        for future in futures:
            future.exception()  # waits: nothing may still run when this returns
        return [future.result() for future in futures]

    def _threads(self, n_parts: int) -> ThreadPoolExecutor:
        n_threads = torch.get_num_threads()
        if self._pool is None or self._pool_is_for != (n_parts, n_threads):
            if self._pool is not None:
                self._pool.shutdown(wait=False)
            self._pool, self._pool_is_for = _started_pool(n_parts, n_threads // n_parts), (n_parts, n_threads)
            # torch takes the latest setting of any thread for all threads that are still to come
            torch.set_num_threads(n_threads)
        return self._pool


def _started_pool(n_workers: int, n_threads_each: int) -> ThreadPoolExecutor:
    def take_share() -> None:
        # a new thread adopts the process's setting when it first asks, over one made before
        torch.get_num_threads()
        torch.set_num_threads(n_threads_each)

    pool = ThreadPoolExecutor(n_workers, thread_name_prefix="rows", initializer=take_share)
    together = threading.Barrier(n_workers)  # a pool starts a thread only while all others are busy
    for future in [pool.submit(together.wait) for _ in range(n_workers)]:
        future.result()
    return pool


def _in_the_same_mode(function: Callable[..., T]) -> Callable[..., T]:
    """``function``, to be called in another thread under the settings of this one, which torch keeps for each
    thread."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def call(*arguments: Tensor | None) -> T:
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            torch.autocast("cpu", dtype=dtype, enabled=autocast),
        ):
            return function(*arguments)

    return call
