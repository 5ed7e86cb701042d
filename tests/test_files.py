"""Files that are there whole or not at all, and what safetensors says of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aen_lightning.files import (
    DTYPES,
    TensorInfo,
    read_json,
    read_safetensors_header,
    read_tensor,
    replacing,
    safetensors_header,
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
    ("content", "message"), [(b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[]", "holds a list, expected")]
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
