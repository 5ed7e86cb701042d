"""The index file of a checkpoint is its author's word: it may name files of the checkpoint, and no others."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from aen_lightning.language_model.checkpoint_files import read_weight_map, without_upper_layers
from aen_lightning.language_model.cut_model import load_config
from tests.support.tiny_models import save_tiny_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(save_tiny_model("gpt2", tmp_path / "models", max_shard_size="5KB"))


def test_a_file_outside_of_the_checkpoint_leaves_no_link_behind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    outside = model.parent / "outside.safetensors"
    outside.write_bytes(b"x")
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["h.0.more"] = "../outside.safetensors"
    (model / INDEX).write_text(json.dumps(index))
    config = load_config(str(model))
    with (
        pytest.raises(
            ValueError, match=r"weight_map\.h\.0\.more: expected the name of a file in this folder"
        ),
        without_upper_layers(str(model), config, 1, revision="main", kwargs={}),
    ):
        pass
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    "content", [[], {}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "/etc/passwd"}}]
)
def test_an_index_that_is_none_is_named(tmp_path: Path, content: Any):
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=INDEX):
        read_weight_map(tmp_path / INDEX)
