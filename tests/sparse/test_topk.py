"""TopK and BatchTopK codes against SAELens and against torch.topk on the dense code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from torch.testing import assert_close

from aen_lightning import sparse
from aen_lightning.sparse.topk import largest_columns
from tests.support.sparse_problem import gradients, make_batch, make_parameters
from tests.support.training import step_input


@pytest.mark.parametrize("k", [1, 4, 50])
def test_equals_saelens_topk_training_sae(k: int) -> None:
    cfg = TopKTrainingSAEConfig(
        d_in=12, d_sae=96, k=k, dtype="float64", rescale_acts_by_decoder_norm=False, apply_b_dec_to_input=True
    )
    sae = TopKTrainingSAE(cfg)
    p = make_parameters(12, 96)
    sae.load_state_dict({name: value.detach() for name, value in p.items()})
    x = make_batch(31, 12)
    expected = sae.training_forward_pass(step_input(x))
    expected.loss.backward()
    code = sparse.encode_topk(x, p["W_enc"], p["b_enc"], p["b_dec"], k=k)
    out = sparse.loss(x, code, **p)
    assert_close(code.to_dense(), expected.feature_acts.detach())
    assert_close(code.feature_acts().to_dense(), expected.feature_acts.detach())
    assert_close(code.feature_sums, expected.feature_acts.detach().sum(dim=0))
    assert_close(out.mse_loss, expected.losses["mse_loss"])
    assert_close(out.sae_out, expected.sae_out)
    for name, grad in gradients(out.loss, p).items():
        assert_close(grad, getattr(sae, name).grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("k", [0.5, 3.25, 60])
def test_equals_saelens_batch_topk_training_sae(k: float) -> None:
    # 60 of 96: more than are positive, so that the ReLU decides
    cfg = BatchTopKTrainingSAEConfig(
        d_in=12, d_sae=96, k=k, dtype="float64", rescale_acts_by_decoder_norm=False, apply_b_dec_to_input=True
    )
    sae = BatchTopKTrainingSAE(cfg)
    p = make_parameters(12, 96)
    sae.load_state_dict({name: value.detach() for name, value in p.items()}, strict=False)
    x = make_batch(31, 12)
    expected = sae.training_forward_pass(step_input(x))
    expected.loss.backward()
    code = sparse.encode_batch_topk(x, p["W_enc"], p["b_enc"], p["b_dec"], k=k)
    assert code.nnz == (int(31 * k) if k < 60 else int((expected.feature_acts > 0).sum()))
    out = sparse.loss(x, code, **p)
    assert_close(code.to_dense(), expected.feature_acts.detach())
    assert_close(0.01 * code.values.min(), sae.topk_threshold)  # SAELens moves from 0 by its rate of 0.01
    assert_close(out.mse_loss, expected.losses["mse_loss"])
    for name, grad in gradients(out.loss, p).items():
        assert_close(grad, getattr(sae, name).grad, rtol=1e-10, atol=1e-10)


def test_slices_do_not_change_the_codes() -> None:
    p = make_parameters(12, 1000, dtype=torch.float32)
    x = make_batch(700, 12, dtype=torch.float32)
    for encode, k in (
        (sparse.encode_topk, 5),
        (sparse.encode_batch_topk, 5),
        (sparse.encode_batch_topk, 300),
    ):
        one, many = (encode(x, p["W_enc"], p["b_enc"], k=k, block_elements=b) for b in (10**9, 1))
        assert torch.equal(one.features, many.features)
        assert torch.equal(one.tokens, many.tokens)
        assert_close(one.values, many.values)
        assert (one.feature_offsets.diff() == one.feature_counts).all()


@pytest.mark.parametrize("screen", [True, False])
def test_batch_topk_of_a_screened_product(screen: bool) -> None:
    p = make_parameters(64, 2048, bias=-1.0, dtype=torch.float32)
    x = make_batch(512, 64, dtype=torch.float32)
    z = (x - p["b_dec"]).double() @ p["W_enc"].double() + p["b_enc"].double()
    n = 512 * 4
    code = sparse.encode_batch_topk(
        x, p["W_enc"], p["b_enc"], p["b_dec"], k=4, screen=screen, block_elements=2**17
    )
    assert code.nnz == n
    least = z.flatten().topk(n).values.min()
    assert_close(code.values.min().double(), least, rtol=1e-5, atol=1e-5)
    assert_close(code.values.double(), z[code.tokens, code.features], rtol=1e-5, atol=1e-5)


def test_errors_name_what_is_wrong() -> None:
    p = make_parameters(4, 8)
    x = make_batch(3, 4)
    with pytest.raises(ValueError, match="k must be between 1 and d_sae = 8, got 9"):
        sparse.encode_topk(x, p["W_enc"], p["b_enc"], k=9)
    for k in (0.3, 9):
        with pytest.raises(
            ValueError, match=f"k must be above 0, at most d_sae = 8, and keep .* batch of 3, got {k}"
        ):
            sparse.encode_batch_topk(x, p["W_enc"], p["b_enc"], k=k)


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 9), columns=st.sampled_from([64, 1024, 1600, 1601]), seed=st.integers(0, 2**16))
def test_largest_columns_are_those_of_torch_topk(k: int, columns: int, seed: int) -> None:
    matrix = make_batch(7, columns, seed)
    ours = largest_columns(matrix, k).sort(dim=1).values
    assert torch.equal(ours, matrix.topk(k, dim=1).indices.sort(dim=1).values)
