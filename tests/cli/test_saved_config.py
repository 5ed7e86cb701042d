"""What a run leaves says everything of it but its secrets."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from aen_lightning.cli.main import run
from tests.support.text import documents
from tests.support.tiny_models import save_tiny_model

TOKEN = "hf_" + "aB3" * 8
PASSWORD = "letmein-letmein"


def contents(folder: Path) -> dict[str, bytes]:
    """All that is in a folder, the members of zip files too."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path)] = path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    found |= {f"{path}:{name}": archive.read(name) for name in archive.namelist()}
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in documents(400)))
    return save_tiny_model("gpt2", tmp_path / "model")


@pytest.mark.slow
def test_a_run_on_live_text_writes_no_secret_anywhere(model: Path, tmp_path: Path):
    config = {
        "model": {"sae": {"architecture": "aen", "d_in": 16, "d_sae": 32}},
        "data": {
            "class_path": "TextActivationsDataModule",
            "init_args": {
                "model_name": str(model), "hook_name": "blocks.1.hook_resid_post", "context_size": 8,
                "dataset_path": [str(tmp_path / "text.jsonl")], "train_batch_size_tokens": 32,
                "held_out_documents": 8, "buffer_size_tokens": 128,
                "model_from_pretrained_kwargs": {"token": PASSWORD, "proxies": {"https": f"http://u:{TOKEN}@proxy.invalid"}},
            },
        },
        "trainer": {"max_steps": 4, "default_root_dir": str(tmp_path / "runs"), "accelerator": "cpu",
                    "limit_val_batches": 0},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    run(["fit", "--config", str(tmp_path / "config.yaml")])
    found = contents(tmp_path / "runs")
    assert any(name.endswith(".ckpt") for name in found)
    assert any(name.endswith("final/cfg.json") for name in found)
    leaks = [
        name for name, content in found.items() if TOKEN.encode() in content or PASSWORD.encode() in content
    ]
    assert not leaks
    run(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")])
    assert TOKEN not in (tmp_path / "page.html").read_text()
