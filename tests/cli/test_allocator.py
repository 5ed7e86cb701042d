"""Freed memory stays with the process: asked of glibc itself, in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

from aen_lightning.cli.main import main

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these thresholds")

# after 16 MiB were taken and given back, how much of it does the heap still hold? (mallinfo2 is ten sizes;
# the last two are the bytes free in the heap and, of these, at its top)
_KEPT = """
import ctypes
{before}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
class Info(ctypes.Structure):
    _fields_ = [(str(i), ctypes.c_size_t) for i in range(10)]
libc.mallinfo2.restype = Info
libc.free(libc.malloc(16 * 2**20))
print(getattr(libc.mallinfo2(), "8") >= 16 * 2**20)
"""
_KEEP = "from aen_lightning.cli.allocator import keep_freed_memory; print(keep_freed_memory())"


def run(before: str, **env: str) -> list[str]:
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))
    } | env
    done = subprocess.run(
        [sys.executable, "-c", _KEPT.format(before=before)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.split()


@glibc
def test_freed_memory_stays_in_the_heap() -> None:
    assert run("") == ["False"]
    assert run(_KEEP) == ["True", "True"]


@glibc
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_the_users_own_thresholds_stay(name: str) -> None:
    assert run(_KEEP, **{name: "65536"}) == ["False", "False"]


def test_aen_calls_it_and_importing_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("aen_lightning.cli.allocator.keep_freed_memory", lambda: calls.append(1))
    assert main(["--version"]) == 0
    assert not calls
    assert main(["recipes", "list"]) == 0
    assert calls == [1]
