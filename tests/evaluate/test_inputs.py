"""Text, shards and synthetic data to evaluate on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.evaluate import (
    Inputs,
    ShardInputs,
    SyntheticInputs,
    evaluate_dictionary,
    evaluate_reconstruction,
)
from aen_lightning.evaluate.results import write_result
from tests.support.evaluation import (
    dictionary,
    shard_set,
    text_inputs,
)
from tests.support.shard_sets import HOOK as SHARD_HOOK
from tests.support.tiny_models import D_MODEL, EOS


def test_text_inputs_are_the_test_batches_of_training(model_path: str, rows: list[list[int]]):
    """The same activations, in the same order, that `aen test` sees; norm outliers left out alike."""
    lm = AutoModelForCausalLM.from_pretrained(model_path)
    inputs = text_inputs(lm, rows, norm_outlier_multiple=1.2, store_batch_size_prompts=5)
    kept = torch.cat([b.x[b.keep] for b in inputs])
    expected = torch.cat(list(inputs.data.test_dataloader()))
    assert_close(kept, expected)
    assert len(kept) < sum(t != EOS for row in rows[1::2] for t in row)
    assert inputs.describe()["excluded_token_ids"] == [0, 1, 2]
    assert_close(inputs.tokens(7), expected[:7])


def test_inputs_do_not_depend_on_how_they_are_cut(
    monkeypatch: pytest.MonkeyPatch, model_path: str, rows: list[list[int]]
):
    sae = dictionary("standard")
    inputs = text_inputs(AutoModelForCausalLM.from_pretrained(model_path), rows)
    whole = evaluate_reconstruction(sae, inputs)
    monkeypatch.setattr("aen_lightning.evaluate.reconstruction.tokens_per_chunk", lambda _: 1)
    inputs.batch_size_prompts = 2
    parts = evaluate_reconstruction(sae, inputs)
    for a, b in ((whole.sparsity, parts.sparsity), (whole.spaces["scaled"], parts.spaces["scaled"])):
        for name in a:
            assert a[name]["value"] == pytest.approx(b[name]["value"], rel=1e-5)
            assert a[name]["se"] == pytest.approx(b[name]["se"], rel=1e-3)
    assert_close(whole.density, parts.density)


def test_shard_inputs_take_the_end_of_the_set_and_leave_tokens_out(tmp_path: Path):
    path, x, ids = shard_set(tmp_path)
    inputs = ShardInputs(str(path), SHARD_HOOK, held_out_fraction=0.5, tokens_per_unit=8)
    kept = torch.cat([b.x[b.keep] for b in inputs])
    assert_close(kept, x[len(x) - len(x) // 2 :])
    assert inputs.n_units == -(-(len(x) // 2) // 8)
    everything = ShardInputs(str(path), SHARD_HOOK, held_out_fraction=1.0, exclude_token_ids=[int(ids[3])])
    kept = torch.cat([b.x[b.keep] for b in everything])
    assert_close(kept, x[ids != ids[3]])
    with pytest.raises(ValueError, match=r"has no activations of 'blocks\.9"):
        ShardInputs(str(path), "blocks.9.hook_resid_post")
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], got 0"):
        ShardInputs(str(path), SHARD_HOOK, held_out_fraction=0)


def test_a_dictionary_that_never_fires_has_a_result_too(tmp_path: Path):
    sae = dictionary("standard")
    sae.b_enc.data.fill_(-1e6)
    result = evaluate_dictionary(
        sae, SyntheticInputs(SpikedDataModule(d_in=D_MODEL, n_features=32, k=3), n_samples=64)
    )
    assert result["features"]["dead_pct"] == 100
    assert result["features"]["gini"] is None
    assert result["sparsity"]["l0"]["value"] == 0
    write_result(result, tmp_path / "evaluation.json")


def test_nothing_left_to_evaluate_is_said():
    class Nothing(Inputs):
        n_units, d_in = 1, D_MODEL

        def __iter__(self):
            from aen_lightning.evaluate import InputBatch

            yield InputBatch(torch.ones(1, 3, D_MODEL), torch.zeros(1, 3, dtype=torch.bool), 0)

        def describe(self) -> dict[str, Any]:
            return {}

    with pytest.raises(ValueError, match="no token is left"):
        evaluate_reconstruction(dictionary("standard"), Nothing())
