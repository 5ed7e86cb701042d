"""Codes against the dense encoder."""

from __future__ import annotations

import pytest
import torch
from sae_lens import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
)
from torch.testing import assert_close

from aen_lightning import sparse
from tests.support.sparse_problem import dense_terms, encode, gradients, make_batch, make_parameters


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_code_statistics_and_forms_equal_the_dense_code(apply_b_dec: bool) -> None:
    p = make_parameters(16, 100, bias=-1.0)
    x = make_batch(37, 16)
    h = torch.relu((x - p["b_dec"] if apply_b_dec else x) @ p["W_enc"] + p["b_enc"]).detach()
    code = encode(x, p, apply_b_dec_to_input=apply_b_dec)
    dense = sparse.encode_dense(x, p["W_enc"], p["b_enc"], p["b_dec"] if apply_b_dec else None)
    for c in (code, dense):
        assert_close(c.to_dense(), h)
        assert_close(c.feature_sums, h.sum(dim=0))
        assert torch.equal(c.feature_counts, (h > 0).sum(dim=0))
        assert_close(c.l0, (h > 0).sum(dim=-1).float().mean())
    assert code.nnz == int((h > 0).sum())
    assert code.density == pytest.approx((h > 0).double().mean().item())
    assert_close(code.csr().to_dense(), h)
    acts = code.feature_acts()
    assert acts.is_coalesced()
    assert_close(acts.to_dense(), h)
    rebuilt = torch.sparse_coo_tensor(
        acts.indices(), acts.values(), acts.shape, check_invariants=True
    ).coalesce()
    assert torch.equal(rebuilt.indices(), acts.indices())  # the order that is_coalesced promised


def test_slices_do_not_change_the_code() -> None:
    p = make_parameters(12, 1000, bias=-1.5)
    x = make_batch(40, 12)
    whole = encode(x, p, block_elements=10**9)
    for block_elements in (1, 300 * 40, 512 * 40):
        sliced = encode(x, p, block_elements=block_elements)
        assert torch.equal(sliced.tokens, whole.tokens)
        assert torch.equal(sliced.features, whole.features)
        assert torch.equal(sliced.feature_offsets, whole.feature_offsets)
        assert_close(sliced.values, whole.values)


@pytest.mark.parametrize("screen", [False, True])
@pytest.mark.parametrize("which", ["x", "W_enc", "b_enc"])
def test_nan_reaches_the_loss(which: str, screen: bool) -> None:
    p = make_parameters(8, 64, bias=-1.0, dtype=torch.float32)
    x = make_batch(16, 8, dtype=torch.float32)
    with torch.no_grad():
        {"x": x, **p}[which].view(-1)[3] = float("nan")
    code = encode(x, p, screen=screen)
    assert sparse.loss(x, code, **p).loss.isnan()


@pytest.mark.parametrize("screen", [True, False])
def test_threshold_keeps_what_saelens_jumprelu_keeps(screen: bool) -> None:
    p = make_parameters(64, 512, bias=-1.0, dtype=torch.float32)
    x = make_batch(256, 64, dtype=torch.float32)
    threshold = torch.linspace(-1, 1.5, 512)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=64, d_sae=512, apply_b_dec_to_input=True))
    sae.load_state_dict({"threshold": threshold, **{name: value.detach() for name, value in p.items()}})
    code = encode(x, p, threshold=threshold, screen=screen, block_elements=2**15)
    expected = sae.encode(x)
    close_call = (expected - threshold).abs() < 1e-5  # rounding may decide these either way
    assert_close(code.to_dense()[~close_call], expected[~close_call].detach(), rtol=1e-5, atol=1e-5)
    assert 0 < code.feature_counts[-100:].sum() < code.feature_counts[:100].sum()


def test_threshold_is_exact_at_equality() -> None:
    # pre-activations 1, 2, 3 of three features on one token: kept where strictly above
    x, W_enc, b_enc = torch.ones(1, 1), torch.tensor([[0.5, 1.0, 2.0]]), torch.tensor([0.5, 1.0, 1.0])
    code = sparse.encode(x, W_enc, b_enc, threshold=torch.tensor([1.0, 1.9999999, 3.0]))
    assert code.features.tolist() == [1]
    assert code.values.tolist() == [2.0]


def test_saelens_trainer_statistics_take_the_sparse_activations() -> None:
    p = make_parameters(8, 40, bias=-1.0)
    x = make_batch(20, 8)
    code = encode(x, p)
    firing = code.feature_acts().bool().float()  # as SAETrainer._train_step does
    assert_close(firing.sum(-2).to_dense(), code.feature_counts.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_makes_the_same_code_as_the_dense_encoder_under_autocast(dtype: torch.dtype) -> None:
    p = make_parameters(32, 200, bias=-1.0, dtype=torch.float32)
    x = make_batch(64, 32, dtype=torch.float32)
    weights = torch.rand(200, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", dtype=dtype):
        h = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
        want = dense_terms(x, p, weights, 0.1)
        code = encode(x, p)
        topk = sparse.encode_topk(x, p["W_enc"], p["b_enc"], p["b_dec"], k=8)
        out = sparse.loss(x, code, l1_weights=weights, l2_coefficient=0.1, **p)
    assert h.dtype == torch.float32  # the bias promotes: so it must here
    assert torch.equal(code.to_dense(), h)
    assert_close(topk.to_dense().sum(dim=1), h.topk(8).values.sum(dim=1), rtol=1e-3, atol=1e-3)
    assert out.loss.dtype == torch.float32
    for actual, expected in zip(out[:3], want[:3], strict=True):
        assert_close(actual, expected.float(), rtol=1e-2, atol=1e-2)
    expected_grads = gradients(want[0] + want[1] + want[2], p)
    for name, grad in gradients(out.loss, p).items():
        assert grad.dtype == torch.float32
        scale = expected_grads[name].abs().max().item()
        assert_close(grad, expected_grads[name], rtol=0, atol=0.02 * scale)


def test_errors_name_what_is_wrong() -> None:
    p = make_parameters(4, 8)
    x = make_batch(3, 4)
    with pytest.raises(ValueError, match=r"got \(3, 5\) and \(4, 8\)"):
        encode(make_batch(3, 5), p)
    with pytest.raises(ValueError, match=r"b_enc must be \(d_sae,\) = \(8,\), got \(7,\)"):
        sparse.encode(x, p["W_enc"], p["b_enc"][:7])
    with pytest.raises(ValueError, match=r"b_dec must be \(d_in,\) = \(4,\), got \(3,\)"):
        sparse.encode(x, p["W_enc"], p["b_enc"], p["b_dec"][:3])
    with pytest.raises(ValueError, match="no tokens"):
        encode(x[:0], p)
    with pytest.raises(TypeError, match=r"float32 or float64 parameters, got torch\.bfloat16"):
        sparse.encode(x, p["W_enc"].bfloat16(), p["b_enc"])
    with pytest.raises(ValueError, match=r"the code is \(3, 8\), but x and W_dec make .* = \(2, 8\)"):
        sparse.loss(x[:2], encode(x, p), **p)
    with pytest.raises(ValueError, match=r"l1_weights must be \(d_sae,\) = \(8,\), got \(4,\)"):
        sparse.loss(x, encode(x, p), l1_weights=torch.ones(4), **p)
    with pytest.raises(
        ValueError, match=r"slopes must have the shape of code.values, \(\d+,\), got \(3, 8\)"
    ):
        sparse.loss(x, encode(x, p), l1_weights=torch.ones(8), slopes=torch.ones(3, 8), **p)
    with pytest.raises(ValueError, match="give l1_weights, too"):
        sparse.loss(x, encode(x, p), slopes=torch.ones(3, 8), **p)
    with pytest.raises(ValueError, match=r"threshold must be \(d_sae,\) = \(8,\), got \(\)"):
        encode(x, p, threshold=torch.tensor(1.0))
