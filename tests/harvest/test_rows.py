"""The rows on disk are the full model's activations."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from aen_lightning.harvest import HarvestModule
from aen_lightning.harvest.tokens import MarkedTokenRows, batches_of, position_ids_of
from aen_lightning.shards import ShardSet, verify
from tests.support.harvests import CONTEXT, HOOK, as_set, harvest, hidden, packed, rows_of, saved
from tests.support.tiny_models import BOS, EOS, save_tiny_model, tiny_model, tiny_tokenizer


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
