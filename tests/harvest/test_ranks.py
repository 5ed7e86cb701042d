"""Processes of their own: cut off and started again, and two ranks of FSDP2."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from aen_lightning.shards import Manifest, verify
from tests.support.forked import Forked, fork_ranks
from tests.support.harvests import as_set, harvest
from tests.support.tiny_models import save_tiny_model

# A process of its own: a harvest as a user's script runs it, slowed down so that a signal finds it at work.
SCRIPT = """
import json, os, sys, time
import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from aen_lightning.harvest import HarvestDataModule, HarvestModule, ShardWriter, run_harvest

def parameter_bytes(model):
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return sum(p.numel() * p.element_size() for p in local)

class Slow(pl.Callback):
    def on_predict_batch_end(self, trainer, module, *args):
        time.sleep(float(os.environ["PAUSE"]))
        with open(os.environ["OUT"] + f".bytes{trainer.global_rank}", "w") as f:
            f.write(str(parameter_bytes(module.language_model.model)))
        # threads would gather sharded weights in an order of their own, and the ranks wait for each other for
        # ever
        assert not os.environ.get("FSDP") or module.language_model._threads is None

if __name__ == "__main__":
    devices = int(os.environ.get("WORLD_SIZE", 1))
    strategy = "ddp" if devices > 1 else "auto"
    if os.environ.get("FSDP"):
        strategy = ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_progress_bar=False,
        callbacks=[ShardWriter(os.environ["OUT"], shard_size_mib=0.01), Slow()], default_root_dir=os.environ["OUT"] + ".root",
    )
    data = HarvestDataModule(os.environ["TEXT"], context_size=16, batch_size_prompts=4)
    run_harvest(trainer, HarvestModule(os.environ["MODEL"], ["blocks.1.hook_resid_post"]), data)
"""


def start(tmp_path: Path, ranks: int, *, script: str = SCRIPT, **env: str) -> Forked:
    path = tmp_path / "script.py"
    path.write_text(script)
    return fork_ranks(path, n_ranks=ranks, printed=tmp_path / "printed", **{"PAUSE": "0", **env})


@pytest.mark.slow
@pytest.mark.parametrize("ranks_before", [1, 2])
def test_kill_9_then_run_again_equals_an_uninterrupted_run(
    tmp_path: Path, llama: str, text: str, ranks_before: int
):
    out = tmp_path / "set"
    run = start(tmp_path, ranks_before, MODEL=llama, TEXT=text, OUT=str(out), PAUSE="0.2")
    deadline = time.monotonic() + 90
    while len(list(out.glob("shard-*.safetensors"))) < 3:
        assert not run.ended, run.output
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.kill()
    manifest = Manifest.read(out, with_loose_records=True)
    assert not manifest.complete
    # the last file may lack its record still; then it is made again
    kept = {r.file: (out / r.file).stat().st_mtime_ns for r in manifest.shards}
    assert 2 <= len(kept) < manifest.n_shards
    harvest(out, llama, text)  # one rank now
    assert (
        kept.items() <= {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*.safetensors")}.items()
    )  # not made twice
    harvest(tmp_path / "whole", llama, text)
    assert as_set(out) == as_set(tmp_path / "whole")
    verify(out)


@pytest.mark.slow
def test_a_stopped_rank_ends_a_harvest_by_its_name(tmp_path: Path, llama: str, text: str):
    script = SCRIPT.replace("Slow()]", "Slow(), RankWatch(4)]").replace(
        "import lightning.pytorch as pl", "import lightning.pytorch as pl\nfrom aen_lightning.callbacks import RankWatch"
    ).replace("time.sleep(float", "os.kill(os.getpid(), 19) if trainer.global_rank == 1 else time.sleep(float")  # fmt: skip
    run = start(tmp_path, 2, script=script, MODEL=llama, TEXT=text, OUT=str(tmp_path / "set"), PAUSE="0.2")
    run.processes[0].join(150)
    assert run.processes[0].exitcode == 1, run.output
    run.kill()
    assert "rank 1 has shown no sign of life for 4 s" in run.output


# Appended for FSDP2: other models, in the process group that Lightning leaves.
EVERY_FAMILY = """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from aen_lightning.language_model.cut_model import load_cut_model
    from aen_lightning.language_model.fsdp import load_sharded_cut_model

    mesh, ids = init_device_mesh("cpu", (devices,)), torch.arange(4, 28).view(2, 12)
    for family in os.environ["FAMILIES"].split():
        path, hooks = os.path.join(os.environ["MODELS"], family), ["blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"]
        for dtype in ("float32", "bfloat16"):
            sharded = load_sharded_cut_model(path, hooks, mesh=mesh, dtype=dtype).activations(ids)
            whole = load_cut_model(path, hooks, dtype=dtype).activations(ids)
            for hook in hooks:
                assert whole[hook].dtype == sharded[hook].dtype == getattr(torch, dtype)
                assert torch.equal(whole[hook], sharded[hook]), (family, dtype, hook)
    for kwargs in ({"quantization_config": 8}, {"device_map": "auto"}):
        try:
            load_sharded_cut_model(path, hooks, mesh=mesh, model_from_pretrained_kwargs=kwargs)
        except ValueError as e:
            assert "cannot take" in str(e)
        else:
            raise AssertionError(kwargs)
    print("every family is equal")
"""


@pytest.mark.slow
def test_two_ranks_of_fsdp2_equal_one_process_and_hold_half_the_parameters(
    tmp_path: Path, llama: str, text: str
):
    out, families = (
        tmp_path / "set",
        ["gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt"],
    )
    for family in families:
        save_tiny_model(family, tmp_path, max_shard_size="8KB")  # several files with an index
    output = start(
        tmp_path, 2, script=SCRIPT + EVERY_FAMILY, MODEL=llama, TEXT=text, OUT=str(out), FSDP="1",
        MODELS=str(tmp_path), FAMILIES=" ".join(families),
    ).finish()  # fmt: skip
    assert output.count("every family is equal") == 2
    harvest(tmp_path / "whole", llama, text)
    assert as_set(out) == as_set(tmp_path / "whole")  # bit for bit
    sharded = [int(Path(f"{out}.bytes{rank}").read_text()) for rank in range(2)]
    whole = AutoModelForCausalLM.from_pretrained(llama).model
    total = sum(p.numel() * 4 for m in (whole.embed_tokens, *whole.layers[:2]) for p in m.parameters())
    assert sum(sharded) == total
    assert max(sharded) < 0.55 * total
