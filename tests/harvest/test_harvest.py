"""Harvest.

The rows on disk are the full model's activations, whatever cut the run off and however many ranks made them.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from aen_lightning.cli.harvest import HarvestCLI
from aen_lightning.data.activations import ActivationsDataModule
from aen_lightning.harvest import HarvestDataModule, HarvestModule, ShardWriter, run_harvest
from aen_lightning.harvest.tokens import MarkedTokenRows, batches_of, position_ids_of
from aen_lightning.shards import Manifest, ShardError, ShardSet, verify
from tests.support.tiny_models import BOS, EOS, save_tiny_model, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
HOOK = "blocks.1.hook_resid_post"  # hidden_states[2] of the full model
CONTEXT = 16


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(4, 64, size=generator.integers(1, 40)).tolist() for _ in range(70)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> str:
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(f"w{t}" for t in d)}) + "\n" for d in documents))
    return str(path)


def packed(documents: list[list[int]]) -> torch.Tensor:
    """Documents joined by </s>, cut into rows, by hand; the rest is left out."""
    rows, row = [], []
    for d in documents:
        for j, token in enumerate(d):
            if j == 0 and row:  # SAELens puts no separator at the beginning of a row
                row.append(EOS)
                if len(row) == CONTEXT:
                    rows.append(row)
                    row = []
            row.append(token)
            if len(row) == CONTEXT:
                rows.append(row)
                row = []
    return torch.tensor(rows)


def hidden(model_path: str, rows: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Layer 1's output by transformers, with the whole model."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(rows, output_hidden_states=True, **kwargs).hidden_states[2]


def harvest(
    path: Path, model: str | HarvestModule, text: str, *, shard_size_mib: float = 0.01, model_kwargs: dict[str, Any] | None = None,
    on_non_finite: Any = "stop", **data_kwargs: Any,
) -> Manifest:  # fmt: skip
    module = (
        model if isinstance(model, HarvestModule) else HarvestModule(model, [HOOK], **(model_kwargs or {}))
    )
    data = HarvestDataModule(text, **({"context_size": CONTEXT, "batch_size_prompts": 4} | data_kwargs))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=path.parent,
        callbacks=[ShardWriter(str(path), shard_size_mib=shard_size_mib, on_non_finite=on_non_finite)],
    )  # fmt: skip
    return run_harvest(trainer, module, data)


def rows_of(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    source = ShardSet(path)
    ids = source.token_ids()
    assert ids is not None
    return source.gather(np.arange(source.n_tokens), [HOOK])[HOOK], ids


def as_set(path: Path) -> Counter[tuple[int, bytes]]:
    """Each (token, activation) row, by its bytes, with how often it is there."""
    activations, ids = rows_of(path)
    return Counter((int(i), x.numpy().tobytes()) for i, x in zip(ids, activations, strict=True))


def saved(model: Any, tmp_path: Path) -> str:
    """A folder with the model and the tokenizer."""
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


# --- what is on disk --------------------------------------------------------------------------------------
def test_rows_are_the_full_models_activations(
    tmp_path: Path, llama: str, text: str, documents: list[list[int]]
):
    manifest = harvest(tmp_path / "set", llama, text)
    rows = packed(documents)
    keep = rows.flatten() != EOS
    activations, ids = rows_of(tmp_path / "set")
    assert torch.equal(ids.long(), rows.flatten()[keep])
    assert_close(activations, hidden(llama, rows).flatten(0, 1)[keep], rtol=1e-5, atol=1e-5)
    assert manifest.complete
    assert len(manifest.shards) > 3
    assert manifest.counts == {"read": rows.numel(), "special": int((~keep).sum()), "outlier": 0}
    assert manifest.metadata["hf_hook_names"] == {HOOK: "model.layers.1"}
    verify(tmp_path / "set")
    assert not (tmp_path / "set" / "tokens").exists()
    assert not list((tmp_path / "set").glob("*.tmp"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_on_disk_is_the_rounded_activation(tmp_path: Path, llama: str, text: str, dtype: str):
    harvest(tmp_path / "full", llama, text)
    harvest(tmp_path / "half", llama, text, model_kwargs={"dtype": dtype})
    full, half = rows_of(tmp_path / "full")[0], ShardSet(tmp_path / "half")
    assert half.dtype == getattr(torch, dtype)
    assert torch.equal(half.gather(np.arange(half.n_tokens), [HOOK])[HOOK], full.to(half.dtype).float())


def test_float16_overflow_is_an_error_and_not_infinity(tmp_path: Path, text: str):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e6)
    module = HarvestModule(saved(model, tmp_path), [HOOK], dtype="float16")
    with pytest.raises(ValueError, match="does not fit float16"):
        harvest(tmp_path / "set", module, text)


def test_several_hooks_come_from_one_pass(tmp_path: Path, llama: str, text: str, documents: list[list[int]]):
    names = ["blocks.0.hook_mlp_out", HOOK, "blocks.1.attn.hook_z"]
    manifest = harvest(tmp_path / "set", HarvestModule(llama, names), text)
    assert manifest.d_in == {"blocks.0.hook_mlp_out": 16, HOOK: 16, "blocks.1.attn.hook_z": 24}
    source = ShardSet(tmp_path / "set")
    got = source.gather(np.arange(source.n_tokens), names)
    model, seen = AutoModelForCausalLM.from_pretrained(llama).eval(), {}
    model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: seen.update(mlp=out))
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.update(z=a[0]))
    rows = packed(documents)
    with torch.no_grad():
        model(rows)
    keep = rows.flatten() != EOS
    assert_close(got["blocks.0.hook_mlp_out"], seen["mlp"].flatten(0, 1)[keep], rtol=1e-5, atol=1e-5)
    assert_close(got["blocks.1.attn.hook_z"], seen["z"].flatten(0, 1)[keep], rtol=1e-5, atol=1e-5)


def test_n_tokens_is_exact(tmp_path: Path, llama: str, text: str, documents: list[list[int]]):
    manifest = harvest(tmp_path / "set", llama, text, n_tokens=333, exclude_special_tokens=False)
    assert manifest.n_tokens == manifest.counts["read"] == 333
    full = packed(documents).flatten()[:333]
    assert sorted(rows_of(tmp_path / "set")[1].tolist()) == sorted(full.tolist())


def test_dataset_that_ends_before_n_tokens_says_so(
    tmp_path: Path, llama: str, text: str, documents: list[list[int]]
):
    n = packed(documents).numel()
    with pytest.warns(UserWarning, match=f"ends after {n} tokens; n_tokens was 100000"):
        assert harvest(tmp_path / "set", llama, text, n_tokens=100_000).counts["read"] == n


def test_streamed_dataset_gives_the_same_rows(tmp_path: Path, llama: str, text: str):
    harvest(tmp_path / "set", llama, text)
    harvest(tmp_path / "streamed", llama, text, streaming=True)
    assert as_set(tmp_path / "set") == as_set(tmp_path / "streamed")


def test_excluded_ids_and_bos(tmp_path: Path, llama: str, text: str):
    manifest = harvest(
        tmp_path / "set",
        llama,
        text,
        exclude_token_ids=[5, 6],
        prepend_bos=True,
        exclude_special_tokens=False,
    )
    ids = rows_of(tmp_path / "set")[1]
    assert not torch.isin(ids, torch.tensor([5, 6])).any()
    assert (ids == BOS).sum() == manifest.counts["read"] // CONTEXT  # one in each row, kept
    assert manifest.counts["special"] == manifest.counts["read"] - len(ids)


def test_norm_outliers_are_left_out_and_counted(tmp_path: Path, text: str, documents: list[list[int]]):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] *= 1000  # one token far out, as an attention sink is
    module = HarvestModule(saved(model, tmp_path), ["hook_embed"], norm_outlier_multiple=20.0)
    manifest = harvest(tmp_path / "set", module, text)
    ids = ShardSet(tmp_path / "set").token_ids()
    expected = packed(documents).flatten()
    assert 7 not in ids
    assert manifest.counts["outlier"] == int((expected == 7).sum()) > 0
    assert len(ids) == int(((expected != 7) & (expected != EOS)).sum())
    verify(tmp_path / "set")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_end_the_harvest_or_are_left_out_and_counted(
    tmp_path: Path, text: str, documents: list[list[int]], value: float
):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] = value
    module = HarvestModule(saved(model, tmp_path), ["hook_embed"])
    place = r"rows of activations at 'hook_embed' are not finite \(shard 0, batch \d of rank 0\)"
    with pytest.raises(ValueError, match=place):
        harvest(tmp_path / "set", module, text)
    assert not list((tmp_path / "set").glob("*.safetensors*"))
    manifest = harvest(tmp_path / "set", module, text, on_non_finite="skip")
    ids = ShardSet(tmp_path / "set").token_ids()
    expected = packed(documents).flatten()
    assert 7 not in ids
    assert manifest.counts["non_finite"] == int((expected == 7).sum()) > 0
    assert len(ids) == int(((expected != 7) & (expected != EOS)).sum())
    verify(tmp_path / "set")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "gemma3_text", "mistral", "qwen3"])
def test_masked_documents_do_not_see_each_other(
    tmp_path: Path, text: str, documents: list[list[int]], family: str
):
    """Each document in a row, run alone by the full model, gives the same rows."""
    model = save_tiny_model(family, tmp_path)
    harvest(tmp_path / "set", model, text, n_tokens=400, mask_documents=True, sequence_separator_token=None)
    stream = torch.tensor([t for d in documents for t in d][:400])
    first = torch.zeros(400, dtype=torch.bool)
    first[[i for i in np.cumsum([0, *(len(d) for d in documents)]) if i < 400]] = True
    first[::CONTEXT] = True
    edges = [*first.nonzero().flatten().tolist(), 400]
    full = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        alone = [
            full(stream[None, a:b], output_hidden_states=True).hidden_states[2][0]
            for a, b in itertools.pairwise(edges)
        ]
    assert_close(rows_of(tmp_path / "set")[0], torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_masking_is_refused_where_transformers_would_ignore_it(tmp_path: Path, text: str):
    with pytest.raises(ValueError, match="models of type 'opt' cannot mask documents"):
        harvest(tmp_path / "set", save_tiny_model("opt", tmp_path), text, mask_documents=True)
    assert not list((tmp_path / "set").glob("shard-*"))


def test_unpacked_rows_are_documents_and_padding_is_not_stored(
    tmp_path: Path, llama: str, text: str, documents: list[list[int]]
):
    manifest = harvest(tmp_path / "set", llama, text, pack=False)
    n = sum(map(len, documents))
    assert manifest.n_tokens == manifest.counts["read"] == n
    pieces = [d[i : i + CONTEXT] for d in documents for i in range(0, len(d), CONTEXT)]
    alone = [(piece, hidden(llama, torch.tensor([piece]))[0]) for piece in pieces[:12]]
    activations, ids = rows_of(tmp_path / "set")
    for piece, x in alone:
        window = ids.unfold(0, len(piece), 1)
        at = int((window == torch.tensor(piece)).all(1).nonzero()[0])
        assert_close(activations[at : at + len(piece)], x, rtol=1e-4, atol=1e-4)


def test_batches_of_like_length():
    lengths = torch.tensor([3, 16, 4, 16, 3, 16])
    assert [b.tolist() for b in batches_of(lengths, 2)] == [[1, 3], [5, 2], [0, 4]]


def test_position_ids_by_hand():
    starts = torch.tensor([[0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0]])
    assert position_ids_of(starts).tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5]]


def test_a_bos_separator_opens_the_document_it_precedes():
    rows = MarkedTokenRows(
        Dataset.from_dict({"text": ["w4 w5 w6", "w7 w8"]}), column="text", pretokenized=False, tokenizer=tiny_tokenizer(),
        context_size=6, begin_batch_token_id=BOS, separator_token_id=BOS,
    )  # fmt: skip
    tokens, starts = next(iter(rows.marked()))
    assert tokens.tolist() == [BOS, 4, 5, 6, BOS, 7]
    assert starts.tolist() == [True, False, False, False, True, False]


# --- errors, and runs that are cut off --------------------------------------------------------------------
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


def start(tmp_path: Path, ranks: int, *, script: str = SCRIPT, **env: str) -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(script)
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    )
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    return subprocess.Popen(
        [sys.executable, *launcher, str(path)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PAUSE": "0"} | env,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def descendants(pid: int) -> list[int]:
    """A launcher's children have sessions of their own."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(c) for c in task.read_text().split()]
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds child processes in /proc")
@pytest.mark.parametrize("ranks_before", [1, 2])
def test_kill_9_then_run_again_equals_an_uninterrupted_run(
    tmp_path: Path, llama: str, text: str, ranks_before: int
):
    out = tmp_path / "set"
    process = start(tmp_path, ranks_before, MODEL=llama, TEXT=text, OUT=str(out), PAUSE="0.2")
    deadline = time.monotonic() + 90
    while len(list(out.glob("shard-*.safetensors"))) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for pid in descendants(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
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
    output = finish(
        start(
            tmp_path, 2, script=SCRIPT + EVERY_FAMILY, MODEL=llama, TEXT=text, OUT=str(out), FSDP="1",
            MODELS=str(tmp_path), FAMILIES=" ".join(families),
        )
    )  # fmt: skip
    assert output.count("every family is equal") == 2
    harvest(tmp_path / "whole", llama, text)
    assert as_set(out) == as_set(tmp_path / "whole")  # bit for bit
    sharded = [int(Path(f"{out}.bytes{rank}").read_text()) for rank in range(2)]
    whole = AutoModelForCausalLM.from_pretrained(llama).model
    total = sum(p.numel() * 4 for m in (whole.embed_tokens, *whole.layers[:2]) for p in m.parameters())
    assert sum(sharded) == total
    assert max(sharded) < 0.55 * total


# --- the whole way, and the command line ------------------------------------------------------------------
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
