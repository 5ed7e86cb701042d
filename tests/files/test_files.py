"""Files that are there whole or not at all, and what safetensors says of ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aen_lightning.files import (
    DTYPES,
    TensorInfo,
    Transposed,
    read_json,
    read_safetensors_header,
    read_tensor,
    replacing,
    safetensors_header,
    save_tensors,
    set_default_mode,
    stream_tensors,
    write_json,
)


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(fail: bool) -> None:
        with replacing(path) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old"
            if fail:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(fail=True)
    assert path.read_text() == "old"
    write(fail=False)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_json_comes_back_and_numbers_it_has_not_are_refused(tmp_path: Path):
    path = write_json(tmp_path / "new" / "a.json", {"x": [1, None, "ü"]})
    assert read_json(path) == {"x": [1, None, "ü"]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": float("nan")})
    assert read_json(path) == {"x": [1, None, "ü"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[]", "holds a list, expected")],
)
def test_other_files_are_not_read_as_json(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json {message}"):
        read_json(tmp_path / "a.json")


def test_a_header_is_read_without_the_weights(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_file({"W": torch.zeros(3, 2, dtype=torch.bfloat16), "n": torch.tensor([7])}, path)
    assert read_safetensors_header(path) == {"W": TensorInfo((3, 2), "BF16"), "n": TensorInfo((1,), "I64")}
    assert torch.equal(read_tensor(path, "n"), torch.tensor([7]))
    assert read_tensor(path, "m") is None
    path.write_bytes(path.read_bytes()[:-1])
    for read in (read_safetensors_header, lambda p: read_tensor(p, "n")):
        with pytest.raises(ValueError, match=r"a\.safetensors is no safetensors file, or a damaged one"):
            read(path)


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_safetensors_reads_the_headers_written_here(tmp_path: Path, dtype: torch.dtype):
    tensors = {"ids": torch.arange(3, dtype=torch.int32), "x": torch.randn(3, 5).to(dtype)}
    entries = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    header = safetensors_header(entries, {"format": "pt"})
    assert len(header) % 8 == 0
    data = b"".join(x.view(torch.uint8).numpy().tobytes() for x in tensors.values())
    padded = safetensors_header(entries, {"format": "pt"}, length=len(header) + 64)
    for i, beginning in enumerate((header, padded)):
        (tmp_path / f"{i}.safetensors").write_bytes(beginning + data)
        found = load_file(tmp_path / f"{i}.safetensors")
        assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in tensors.items()}
        assert all(torch.equal(found[name], x) for name, x in tensors.items())
    assert len(padded) == len(header) + 64


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
    monkeypatch.setattr("aen_lightning.files.tensors._SLICE_BYTES", 100)  # a few rows a slice
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
