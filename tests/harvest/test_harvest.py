"""Errors, harvests that go on, and the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.util import get_special_token_ids
from torch.testing import assert_close
from transformers import AutoTokenizer

from aen_lightning.cli.harvest import HarvestCLI
from aen_lightning.data.activations import ActivationsDataModule
from aen_lightning.harvest import HarvestModule, run_harvest
from aen_lightning.shards import ShardError, ShardSet
from tests.support.harvests import CONTEXT, HOOK, as_set, harvest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("module_kwargs", "data_kwargs", "message"),
    [
        ({"hook_names": ["blocks.9.hook_resid_post"]}, {}, "the model has 4 layers"),
        ({"hook_names": ["blocks.1.hook_residpost"]}, {}, "Did you mean"),
        ({"model_dtype": "int8"}, {}, "model_dtype must be one of"),
        ({"norm_outlier_multiple": 0.5}, {}, "norm_outlier_multiple must be above 1"),
        ({}, {"context_size": 65}, "context_size 65 exceeds the model's 64 positions"),
        ({}, {"context_size": 1}, "context_size must be at least 2, got 1"),
        ({}, {"n_tokens": 0}, "n_tokens must be at least 1"),
        ({}, {"mask_documents": True, "pack": False}, "mask_documents is for packed rows"),
        ({}, {"text_column": "txet"}, "txet"),
    ],
)
def test_errors_come_before_work(
    tmp_path: Path,
    llama: str,
    text: str,
    module_kwargs: dict[str, Any],
    data_kwargs: dict[str, Any],
    message: str,
):
    with pytest.raises(ValueError, match=message):
        harvest(
            tmp_path / "set",
            HarvestModule(**({"model_name": llama, "hook_names": [HOOK]} | module_kwargs)),
            text,
            **data_kwargs,
        )
    assert not list(tmp_path.rglob("shard-*"))


def test_disk_too_small_is_refused_before_work(tmp_path: Path, llama: str, text: str):
    with pytest.raises(ShardError, match=r"its disk has [\d.]+ [GT]B free"):
        harvest(tmp_path / "set", llama, text, n_tokens=10**15)
    assert not (tmp_path / "set").exists()


def test_run_again_does_nothing_and_other_settings_are_refused(tmp_path: Path, llama: str, text: str):
    first = harvest(tmp_path / "set", llama, text)
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").iterdir()}
    module = HarvestModule(llama, [HOOK])
    assert harvest(tmp_path / "set", module, text).shards == first.shards
    assert module.language_model is None  # the model was not even loaded
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "set").glob("shard*")}.items() <= times.items()
    with pytest.raises(ShardError, match="context_size was 16, now 8"):
        harvest(tmp_path / "set", llama, text, context_size=8)


def test_what_was_cut_off_after_its_last_shard_leaves_no_rows_of_tokens(
    tmp_path: Path, llama: str, text: str
):
    harvest(tmp_path / "set", llama, text)
    left = tmp_path / "set" / "tokens"
    left.mkdir()
    (left / "tokens-00000.safetensors").write_bytes(b"")
    harvest(tmp_path / "set", llama, text)
    assert not left.exists()


def test_deleted_shard_is_made_again(tmp_path: Path, llama: str, text: str):
    """What the reader's error advises for a damaged shard.

    The tokens are gone by then, and are made again.
    """
    first = harvest(tmp_path / "set", llama, text)
    before = as_set(tmp_path / "set")
    (tmp_path / "set" / first.shards[1].file).unlink()
    assert harvest(tmp_path / "set", llama, text).shards == first.shards
    assert as_set(tmp_path / "set") == before


def test_failing_disk_stops_the_run_and_the_next_one_finishes(
    tmp_path: Path, llama: str, text: str, monkeypatch: pytest.MonkeyPatch
):
    harvest(tmp_path / "whole", llama, text)
    real, calls = os.pwrite, 0

    def failing(fd: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr("aen_lightning.shards.write.os.pwrite", failing)
    with pytest.raises(OSError, match="No space left"):
        harvest(tmp_path / "set", llama, text)
    monkeypatch.undo()
    assert not list((tmp_path / "set").glob("*.tmp"))
    with pytest.raises(ShardError, match="incomplete"):
        ShardSet(tmp_path / "set")
    harvest(tmp_path / "set", llama, text)
    assert as_set(tmp_path / "set") == as_set(tmp_path / "whole")


def test_an_activations_data_module_reads_a_harvest(tmp_path: Path, llama: str, text: str):
    harvest(tmp_path / "set", llama, text)
    data = ActivationsDataModule(str(tmp_path / "set"), train_batch_size_tokens=32, input_scaling="per_token")
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert_close(batch.norm(dim=1), torch.full((32,), 4.0))  # sqrt(16)
    assert data.sae_metadata["model_name"] == llama
    assert data.sae_metadata["hf_hook_name"] == "model.layers.1"
    assert data.sae_metadata["context_size"] == CONTEXT
    assert data.sae_metadata["norm_outlier_multiple"] is None
    assert data.sae_metadata["exclude_special_tokens"] is True


def test_a_dictionary_learns_which_tokens_the_harvest_left_out(tmp_path: Path, llama: str, text: str):
    """What ``aen evaluate`` must leave out, too: otherwise attention sinks drown its numbers."""
    model_kwargs = {"norm_outlier_multiple": 20.0}
    harvest(tmp_path / "set", llama, text, model_kwargs=model_kwargs, exclude_token_ids=[7])
    data = ActivationsDataModule(str(tmp_path / "set"), train_batch_size_tokens=32)
    data.prepare_data()
    data.setup()
    assert data.sae_metadata["norm_outlier_multiple"] == 20.0
    special = get_special_token_ids(AutoTokenizer.from_pretrained(llama))
    assert data.sae_metadata["exclude_special_tokens"] == sorted({7, *special})


def test_lightning_cli_wires_a_harvest(tmp_path: Path, llama: str, text: str):
    config = {
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False},
        "model": {"model_name": llama, "hook_names": [HOOK]},
        "data": {"dataset_path": text, "context_size": CONTEXT, "n_tokens": 100},
        "shards": {"path": str(tmp_path / "set")},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    cli = HarvestCLI(["--config", str(tmp_path / "config.yaml")])
    assert run_harvest(cli.trainer, cli.model, cli.datamodule).counts["read"] == 100
    assert cli.datamodule.model_name == llama


@pytest.mark.parametrize("recipe", ["llama-3.1-8b-harvest", "pythia-70m-harvest", "smollm2-135m-harvest"])
def test_recipes_parse(recipe: str, monkeypatch: pytest.MonkeyPatch):
    """Every key exists and has the right type; devices are those of this machine."""
    cli_args = [
        "--config",
        str(ROOT / "recipes" / f"{recipe}.yaml"),
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
    ]
    if recipe.startswith("llama"):
        cli_args.append("--trainer.strategy.init_args.data_parallel_size=1")
    cli = HarvestCLI(cli_args)
    assert cli.datamodule.model_name == cli.model.model_name
    assert cli.datamodule.n_tokens is not None
