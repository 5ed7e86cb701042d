"""Features sharded over 2 and 4 processes against one process that holds them all, in float64.

1e-10 is a hundred thousand roundings of numbers near 1; a step that leaves out one rank's part is off by 1e-3.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file
from torch.testing import assert_close

from aen_lightning.training.module import SAEModule
from tests.support.forked import fork_ranks
from tests.support.ranks import run_ranks
from tests.support.sharded_training import D_IN, D_SAE, SAES, fit
from tests.support.streams import batch_at

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the first test waits for all runs


def _launch(folder: Path, n_ranks: int, plan: list[dict[str, Any]], n_nodes: int = 1) -> None:
    (folder / "plan.json").write_text(
        json.dumps([{"sharded": True, "num_nodes": n_nodes, **p} for p in plan])
    )
    if n_nodes > 1:
        run_ranks("tests.support.sharded_training", str(folder), n_ranks=n_ranks, n_nodes=n_nodes)
        return
    words, printed = ("tests.support.sharded_training", str(folder)), folder / "printed"
    fork_ranks(*words, n_ranks=n_ranks, printed=printed).finish()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs: each architecture whole, on 2 and on 4 ranks; and one that goes from 2 to 4 ranks, then to 1."""
    folder = tmp_path_factory.mktemp("sharded")
    for name in SAES:
        fit(folder, f"{name}_1", name, sharded=False)
    fit(folder, "first_1", "aen", sharded=False, max_steps=8, save="whole_8.ckpt")
    # two nodes of one rank each
    two = [{"name": f"{name}_2", "architecture": name} for name in SAES]
    resumed = {"name": "part_2", "architecture": "aen", "max_steps": 8, "save": "after_8.ckpt"}
    _launch(folder, 2, [*two, resumed], n_nodes=2)
    four = [{"name": f"{name}_4", "architecture": name} for name in SAES]
    resumed = {
        "name": "part_4", "architecture": "aen", "max_steps": 14, "start": 8, "save": "after_14.ckpt",
        "ckpt_path": str(folder / "after_8.ckpt"),
    }  # fmt: skip
    from_whole = {
        "name": "rest_4", "architecture": "aen", "start": 8, "ckpt_path": str(folder / "whole_8.ckpt"),
    }  # fmt: skip
    _launch(folder, 4, [*four, resumed, from_whole])
    resumed = {
        "name": "part_1", "architecture": "aen", "start": 14, "ckpt_path": str(folder / "after_14.ckpt"),
    }  # fmt: skip
    _launch(folder, 1, [resumed])
    return folder


def _read(folder: Path, name: str) -> dict[str, Any]:
    result: dict[str, Any] = torch.load(folder / f"{name}.pt", weights_only=True)
    return result


def _assert_same_training(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        assert_close(found["state"][name], value, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert len(found["moments"]) == len(expected["moments"])
    for ours, theirs in zip(found["moments"], expected["moments"], strict=True):
        for name, value in theirs.items():
            assert_close(ours[name], value, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("architecture", list(SAES))
def test_sharded_training_is_training_whole(folder: Path, architecture: str, n_ranks: int) -> None:
    whole, sharded = _read(folder, f"{architecture}_1"), _read(folder, f"{architecture}_{n_ranks}")
    _assert_same_training(sharded, whole)
    assert sharded["held"] < whole["held"] / n_ranks + 3 * (2 * D_IN + 1), "each rank holds its part only"

    assert sharded["log"].keys() == whole["log"].keys()
    for name, value in whole["log"].items():
        if "tokens_per_second" not in name:
            assert_close(sharded["log"][name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert sharded["val_log"] == pytest.approx(whole["val_log"], abs=1e-6)
    assert sharded["n_training_samples"] == whole["n_training_samples"]
    window, expected = (r["tracker"]["windows"][""] for r in (sharded, whole))
    assert torch.equal(window["last_density"], expected["last_density"])


def test_what_the_comparison_rests_on_is_at_work(folder: Path) -> None:
    aen, topk = (_read(folder, f"{name}_1") for name in ("aen", "topk"))
    assert aen["state"]["tracked.0.sae.l1_weights"].std() > 0.05, "adaptive weights"
    assert aen["log"]["metrics/guarded_share"] > 0, "starvation guard"
    assert topk["log"]["losses/auxiliary_reconstruction_loss"] > 0, "auxiliary loss of dead features"


def test_a_run_goes_on_with_another_number_of_ranks(folder: Path) -> None:
    _assert_same_training(_read(folder, "part_1"), _read(folder, "aen_1"))


def test_a_run_of_one_process_goes_on_sharded(folder: Path) -> None:
    _assert_same_training(_read(folder, "rest_4"), _read(folder, "aen_1"))


def test_a_checkpoint_joined_by_lightning_opens_without_ranks(folder: Path) -> None:
    joined = folder / "joined.ckpt"
    command = ["-m", "lightning.fabric.utilities.consolidate_checkpoint", str(folder / "after_14.ckpt")]
    subprocess.run([sys.executable, *command, "--output_file", str(joined)], check=True, capture_output=True)
    module = SAEModule.load_from_checkpoint(joined, weights_only=True)
    expected = _read(folder, "part_4")["state"]
    assert module.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


def test_batches_that_are_not_the_same_on_every_rank_are_refused(folder: Path) -> None:
    said = json.loads((folder / "refusals.json").read_text())
    assert "data_parallel_size is 2" in said["split"]
    assert "tensor_parallel_size 2" in said["split"]
    assert "batches differ" in said["differ"]


@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("architecture", list(SAES))
def test_the_export_is_that_of_the_whole_sae(folder: Path, architecture: str, n_ranks: int) -> None:
    whole, joined = (folder / f"{architecture}_{n}" / "final" for n in (1, n_ranks))
    assert {f.name for f in joined.parent.iterdir()} == {"final"}, "nothing is left of the parts"
    assert {f.name for f in joined.iterdir()} == {f.name for f in whole.iterdir()}
    for file in whole.glob("*.safetensors"):
        expected, found = load_file(file), load_file(joined / file.name)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(found[name], value, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = (json.loads((f / "cfg.json").read_text()) for f in (joined, whole))
    ours["metadata"]["training_architecture_details"].pop("sparse_step", None)
    theirs["metadata"]["training_architecture_details"].pop("sparse_step", None)
    assert ours == theirs
    sae = SAE.load_from_disk(joined)
    x = batch_at(5000, batch_size=8, d_in=D_IN).double()
    assert sae.encode(x).shape == (8, D_SAE)
