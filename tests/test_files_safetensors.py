"""Writing safetensors files: what is in them, and who may read them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aen_lightning.files import Transposed, save_tensors, set_default_mode, stream_tensors


@pytest.fixture(params=[0o022, 0o027, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_files_may_be_read_as_the_umask_says(tmp_path: Path, umask: int):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    set_default_mode(path)
    assert mode(path) == 0o666 & ~umask
    assert mode(save_tensors(tmp_path / "y.safetensors", {"a": torch.zeros(2)})) == 0o666 & ~umask
    assert mode(stream_tensors(tmp_path / "z.safetensors", {"a": torch.zeros(2)})) == 0o666 & ~umask
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors", "y.safetensors", "z.safetensors"]


def test_saved_tensors_are_those_given(tmp_path: Path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    found = load_file(save_tensors(tmp_path / "x.safetensors", tensors))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_slices_make_the_same_file_as_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("aen_lightning.files._SLICE_BYTES", 100)  # a few rows a slice
    a, b = torch.randn(37, 11), torch.randn(5).to(torch.bfloat16)
    stream_tensors(tmp_path / "x.safetensors", {"a": Transposed(a), "plain": a, "b": b})
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], a.T)
    assert torch.equal(found["plain"], a)
    assert torch.equal(found["b"], b)


def test_numbers_that_are_not_finite_leave_no_file(tmp_path: Path):
    with pytest.raises(ValueError, match="b holds numbers that are not finite"):
        stream_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2), "b": torch.tensor([0.0, torch.inf])})
    assert list(tmp_path.iterdir()) == []
