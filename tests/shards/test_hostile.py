"""A stranger's set of shards: nothing outside of it is read, no number in it is believed before the files say
the same."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from aen_lightning.data.activations import ActivationsDataModule
from aen_lightning.shards import (
    Manifest,
    ShardError,
    ShardFolder,
    ShardSet,
    ShardStream,
    convert,
    info,
    verify,
)
from tests.support.shard_sets import HOOK, flip_byte, write_set


def edit(folder: Path, change: Any) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def put(*place: Any, value: Any) -> Any:
    def change(content: Any) -> None:
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = value

    return change


def shard_twice(content: Any) -> None:
    content["shards"].append(content["shards"][0])
    content["n_tokens"] += content["shards"][0]["n_tokens"]


def without_the_last(content: Any) -> None:
    content["n_tokens"] -= content["shards"].pop()["n_tokens"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("shards", 0, "file", value="../other/shard-00000.safetensors"), r"shards\[0\]\.file: expected the name of"),
        (put("shards", 0, "file", value="/etc/passwd"), r"shards\[0\]\.file: expected the name of"),
        (put("shards", 0, "file", value="shard-00001.safetensors"), r"shards\[0\]\.file is 'shard-00001"),
        (shard_twice, "lists shard-00000.safetensors twice"),
        (without_the_last, "does not list shard-00001"),
        (put("n_shards", value=99), "all 99 shards are there, and does not list shard-00002"),
        (put("n_shards", value=1), "n_shards is 1, and it lists shard-00001"),
        (put("shards", 0, "n_tokens", value=-7), r"shards\[0\]\.n_tokens: expected greater than or equal to 0, got -7"),
        (put("shards", 0, "n_tokens", value=10**12), "1000000000000 tokens of 28 bytes, which cannot both be"),
        (put("shards", 0, "n_tokens", value=7.0), r"shards\[0\]\.n_tokens: expected a valid integer, got 7.0"),
        (put("n_tokens", value=3), "n_tokens is 3, and its shards have 16 together"),
        (put("shards", 0, "sha256", value="x"), r"shards\[0\]\.sha256: expected"),
        (put("d_in", value={}), "d_in: expected"),
        (put("d_in", HOOK, value=-6), "d_in.*: expected greater than or equal to 1, got -6"),
        (put("dtype", value="int8"), "dtype: expected 'float32', 'bfloat16' or 'float16', got 'int8'"),
        (put("context_size", value=0), "context_size: expected greater than or equal to 1"),
        (put("metadata", value=[1]), "metadata: expected a valid dictionary, got a list of 1"),
        (put("metadata", "model_name", value=[1]), "metadata: model_name: expected a valid string"),
        (put("metadata", "to_dict", value=1), "not 'to_dict', the name of a method"),
        (put("filters", value={"norm_outlier_multiple": "high"}), "metadata: norm_outlier_multiple: expected"),
        (put("shards", value={}), "shards: expected a valid list"),
        (put("shard", value=[]), r"there is no key 'shard' \(did you mean 'shards'\?\)"),
        (put("plan", value={"row": []}), "there is no key 'plan.row'"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_is_refused_at_every_door(tmp_path: Path, change: Any, message: str):
    write_set(tmp_path, [7, 9])
    edit(tmp_path, change)
    for door in (verify, info, ShardSet, lambda path: ActivationsDataModule(str(path)).setup()):
        with pytest.raises(ShardError, match=message) as caught:
            door(tmp_path)
        assert str(tmp_path / "manifest.json") in str(caught.value)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "manifest.json", ".verified.json"])
def test_a_link_out_of_the_set_is_not_followed(tmp_path: Path, name: str):
    write_set(tmp_path / "set", [7])
    outside = tmp_path / "outside"
    (tmp_path / "set" / name).rename(outside)
    (tmp_path / "set" / name).symlink_to(outside)
    with pytest.raises(ShardError, match=rf"{name} is a link to .*outside, outside of the set"):
        ShardSet(tmp_path / "set")


def test_links_of_the_hubs_cache_and_inside_the_set_are_followed(tmp_path: Path):
    folder = tmp_path / "datasets--a--b" / "snapshots" / "abc" / "set"
    write_set(folder, [7, 9])
    (tmp_path / "datasets--a--b" / "blobs").mkdir()
    for path in list(folder.iterdir()):
        blob = tmp_path / "datasets--a--b" / "blobs" / f"blob-of-{path.name}"
        path.rename(blob)
        path.symlink_to(Path(os.path.relpath(blob, folder)))
    assert ShardSet(folder, verify="always").n_tokens == 16


def test_notes_that_came_with_a_set_are_not_believed(tmp_path: Path):
    write_set(tmp_path, [7, 9])
    path = tmp_path / "shard-00000.safetensors"
    flip_byte(path)
    files = path.stat()
    # all that somebody can know beforehand: an archive keeps the modification time
    (record,) = [s for s in json.loads((tmp_path / "manifest.json").read_text())["shards"] if s["index"] == 0]
    stamp = [record["sha256"], files.st_size, files.st_mtime_ns]
    for shipped in (stamp, [*stamp, files.st_mtime_ns, 1]):
        (tmp_path / ".verified.json").write_text(json.dumps({path.name: shipped}))
        with pytest.raises(ShardError, match=r"shard-00000\.safetensors is damaged"):
            ShardSet(tmp_path)


def test_damaged_notes_are_named(tmp_path: Path):
    write_set(tmp_path, [7])
    (tmp_path / ".verified.json").write_text('{"../x": 3}')
    with pytest.raises(ShardError, match=r"\.verified\.json: .*delete it"):
        ShardSet(tmp_path)


def test_a_shard_damaged_while_the_harvest_lay_still_is_found(tmp_path: Path):
    manifest = Manifest({HOOK: 2}, "float32", 4, n_shards=2)

    def write(index: int) -> None:
        stream = ShardStream(tmp_path, index, {HOOK: 2}, "float32", 4)
        stream.append({HOOK: torch.ones(4, 2)}, torch.zeros(4))
        stream.close()

    ShardFolder(tmp_path).begin(manifest)
    write(0)
    flip_byte(tmp_path / "shard-00000.safetensors")
    ShardFolder(tmp_path).begin(manifest)
    write(1)
    ShardFolder(tmp_path).collect(complete=True)
    with pytest.raises(ShardError, match=r"shard-00000\.safetensors is damaged"):
        ShardSet(tmp_path)


def test_a_set_just_written_need_not_be_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_set(tmp_path, [7, 9])
    monkeypatch.setattr("aen_lightning.shards.read.hashlib.file_digest", None)
    assert ShardSet(tmp_path).n_tokens == 16


def test_no_secret_stands_in_a_manifest_and_the_harvest_still_goes_on(tmp_path: Path):
    token = "hf_" + "x" * 30
    kwargs = {"model_from_pretrained_kwargs": {"token": token}, "dataset_path": f"https://u:{token}@host/x"}
    for _ in range(2):  # begun, and gone on with
        ShardFolder(tmp_path).begin(
            Manifest({HOOK: 2}, "float32", 4, metadata=dict(kwargs), settings=dict(kwargs))
        )
    assert token not in (tmp_path / "manifest.json").read_text()


def test_what_is_told_of_a_set_is_nothing_a_terminal_obeys(tmp_path: Path):
    write_set(tmp_path, [7])
    edit(tmp_path, put("metadata", "model_name", value="\x1b]0;mine\x07\x1b[2Jtiny"))
    assert "\x1b" not in info(tmp_path)
    assert "\\x1b[2Jtiny" in info(tmp_path)


def test_a_shard_may_be_read_by_whom_the_umask_lets(tmp_path: Path):
    before = os.umask(0o002)
    try:
        write_set(tmp_path, [7])
    finally:
        os.umask(before)
    assert {oct(stat.S_IMODE(p.stat().st_mode)) for p in tmp_path.iterdir()} == {"0o664"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("state.json", '{"_data_files": [{"filename": "../../outside.arrow"}]}'),
        ("state.json", "[]"),
        ("state.json", "{}"),
        ("dataset_info.json", "{"),
        ("dataset_info.json", '{"features": 3}'),
    ],
)
def test_a_cache_that_is_none_is_refused_in_one_line(tmp_path: Path, name: str, text: str):
    write_set(tmp_path / "set", [8])
    convert(tmp_path / "set", tmp_path / "cache")
    (tmp_path / "cache" / name).write_text(text)
    with pytest.raises(ShardError, match=r"cache"):
        convert(tmp_path / "cache", tmp_path / "back")
