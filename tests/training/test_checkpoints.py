from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from aen_lightning.training.checkpoints import CheckpointError, WholeCheckpointIO, newest_whole, require_whole
from tests.support.streams import loader
from tests.support.training import SAE_FIELDS, make_trainer


def content(n: int = 1000) -> dict[str, Any]:
    return {"global_step": 3, "state_dict": {"w": torch.arange(n, dtype=torch.float32)}, "name": "x"}


def written(path: Path) -> Path:
    WholeCheckpointIO().save_checkpoint(content(), path)
    return path


def test_what_was_written_is_read_by_us_and_by_torch(tmp_path: Path):
    path = written(tmp_path / "folder" / "a.ckpt")
    for read in (WholeCheckpointIO().load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(read["state_dict"]["w"], content()["state_dict"]["w"])
        assert read["global_step"] == 3
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]


def test_any_flipped_bit_and_any_cut_is_refused(tmp_path: Path):
    whole = written(tmp_path / "whole.ckpt").read_bytes()
    require_whole(tmp_path / "whole.ckpt")
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(whole), (200,), generator=generator).tolist()
    for number, place in enumerate(
        [*places, 0, len(whole) - 78, len(whole) - 76, len(whole) - 75, len(whole) - 1]
    ):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (number % 8)
        path = tmp_path / f"flipped-{number}.ckpt"
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged|no checkpoint"):
            WholeCheckpointIO().load_checkpoint(path)
    for length in (0, 1, 80, len(whole) // 2, len(whole) - 1):
        path = tmp_path / f"cut-{length}.ckpt"
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"damaged|no checkpoint"):
            require_whole(path)


def test_a_checkpoint_of_lightnings_own_writer_is_checked_by_its_crc(tmp_path: Path):
    path = tmp_path / "theirs.ckpt"
    TorchCheckpointIO().save_checkpoint(content(), path)
    require_whole(path)
    data = bytearray(path.read_bytes())
    at = data.index(torch.arange(1000, dtype=torch.float32).numpy().tobytes())
    data[at + 5] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not fit its CRC"):
        require_whole(path)


def test_a_disk_that_fills_up_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path):
    path = written(tmp_path / "a.ckpt")
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails as on a full disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(
            OSError, match=r"File too large: the checkpoint is not written, .* free"
        ) as raised:
            WholeCheckpointIO().save_checkpoint(content(100_000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename == str(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_the_newest_whole_one_is_found_and_the_damaged_are_named(tmp_path: Path):
    old, new, torn = (written(tmp_path / f"{name}.ckpt") for name in ("old", "new", "torn"))
    torn.write_bytes(torn.read_bytes()[:-100])
    for age, path in enumerate((torn, new, old)):
        os.utime(path, (1e9 - age, 1e9 - age))
    assert newest_whole([old, new, torn]) == (new, [torn])
    assert newest_whole([]) == (None, [])


def test_a_fit_writes_checkpoints_beside_their_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from aen_lightning.training.module import SAEModule

    def fails(*_: Any) -> None:
        raise AssertionError("written through the temporary folder")

    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io._atomic_save", fails)
    saver = ModelCheckpoint(tmp_path, filename="a", every_n_train_steps=2)
    trainer = make_trainer(tmp_path, 2, enable_checkpointing=True, callbacks=[saver])
    trainer.fit(SAEModule(SAE_FIELDS), loader())
    require_whole(tmp_path / "a.ckpt")
