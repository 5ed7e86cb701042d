"""How the process gets memory on Linux CPUs."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
# the first is the most that every glibc takes on 64 bits; a tensor above it still comes from the kernel each
# time
_MMAP_THRESHOLD_BYTES, _KEPT_BYTES = 32 * 2**20, 2**30
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let glibc keep up to 1 GiB of freed memory, of tensors up to 32 MiB, instead of handing each back to
    the kernel.

    By default each intermediate tensor of some megabytes is new pages from the kernel, zeroed at first touch,
    and goes back when it is freed: on a CPU that is a tenth of a small model's forward pass
    (``benchmarks/harvest.py`` measures it). The peak does not grow, but memory stays at it. It concerns the
    whole process, so ``aen`` calls it and importing this package does not; call it before the first large
    tensor.

    Returns:
        Whether it was set: not where the C library is another one than glibc, nor where the environment has
        chosen an allocator or its thresholds (``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``,
        ``GLIBC_TUNABLES``, ``LD_PRELOAD``).
    """
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in _SETTINGS):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # the first call also ends glibc's own adjusting of both thresholds
    return all(
        [libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES), libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)]
    )
