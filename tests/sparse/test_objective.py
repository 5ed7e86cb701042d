"""The loss and its gradients against dense autograd in float64, SAELens and hand-worked numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from torch import Tensor
from torch.testing import assert_close

from aen_lightning import sparse
from tests.support.sparse_problem import (
    F64,
    NAMES,
    dense_terms,
    encode,
    gradients,
    make_batch,
    make_parameters,
)
from tests.support.training import step_input


def scad(h: Tensor) -> Tensor:
    # Fan and Li (2001) with tau 0.5 and a 3.7, divided by tau: 1 up to tau, falling to 0 at a tau
    return ((3.7 * 0.5 - h) / (2.7 * 0.5)).clamp(0, 1)


SLOPES: dict[str, Any] = {
    "l1": None,
    "mcp": lambda h: (1 - h / 2).clamp_min(0),
    "scad": scad,
    "log": lambda h: 0.7 / (0.7 + h),
}


def largest(z: Tensor, k: int, dim: int) -> Tensor:
    """A mask of the k largest along ``dim``."""
    return torch.zeros_like(z).scatter(dim, z.topk(k, dim=dim).indices, 1.0).bool()


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 33),
    d_in=st.integers(1, 17),
    d_sae=st.integers(1, 70),
    bias=st.sampled_from([-100.0, -2.0, -1.0, 0.0, 3.0]),
    l2=st.sampled_from([0.0, 0.3]),
    slope=st.sampled_from(list(SLOPES)),
    apply_b_dec=st.booleans(),
    feature_major=st.booleans(),
    kind=st.sampled_from(["sparse", "dense", "jumprelu", "topk", "batch_topk"]),
    seed=st.integers(0, 2**16),
)
def test_loss_and_gradients_equal_dense_autograd(
    batch: int,
    d_in: int,
    d_sae: int,
    bias: float,
    l2: float,
    slope: str,
    apply_b_dec: bool,
    feature_major: bool,
    kind: str,
    seed: int,
) -> None:
    p = make_parameters(d_in, d_sae, bias=bias, seed=seed)
    with torch.no_grad():
        p["b_enc"][::3] = -100.0  # dead features
    x = make_batch(batch, d_in, seed + 1)
    # Tokens at the origin of the code: empty rows wherever the bias is negative. Equal tokens tie in a batch's top k.
    x[:: 4 if kind != "batch_topk" else batch] = p["b_dec"].detach()
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(d_sae, dtype=F64, generator=generator, requires_grad=True)
    threshold = 2 * torch.rand(d_sae, dtype=F64, generator=generator) - 0.5
    k = 1 + seed % min(7, d_sae)
    pull = make_batch(batch, d_in, seed + 2)
    activation = {
        "jumprelu": lambda z: torch.relu(z) * (z > threshold),
        "topk": lambda z: torch.relu(z) * largest(z, k, dim=1),
        "batch_topk": lambda z: torch.relu(z) * largest(z.flatten(), k * batch, dim=0).view_as(z),
    }.get(kind, torch.relu)
    expected = dense_terms(x, p, weights, l2, apply_b_dec, activation, SLOPES[slope])
    inputs = [*p.values(), weights]
    # unequal factors, so that no term can stand in for another, and a gradient through the reconstruction
    factors = (1.0, 2.0, 3.0)
    expected_grads = torch.autograd.grad(
        sum(f * t for f, t in zip(factors, expected[:3], strict=True)) + (pull * expected[3]).sum(),
        inputs,
    )
    if feature_major:
        sparse.feature_major_(p["W_enc"])
    encoder = (x, p["W_enc"], p["b_enc"], p["b_dec"] if apply_b_dec else None)
    code: Any = {
        "sparse": lambda: sparse.encode(*encoder, block_elements=64),
        "dense": lambda: sparse.encode_dense(*encoder),
        "jumprelu": lambda: sparse.encode(*encoder, threshold=threshold, block_elements=64),
        "topk": lambda: sparse.encode_topk(*encoder, k=k, block_elements=64),
        "batch_topk": lambda: sparse.encode_batch_topk(*encoder, k=k, block_elements=64),
    }[kind]()
    out = sparse.loss(
        x,
        code,
        l1_weights=weights,
        slopes=None if SLOPES[slope] is None else SLOPES[slope](code.values),
        l2_coefficient=l2,
        apply_b_dec_to_input=apply_b_dec,
        **p,
    )
    total = sum(f * t for f, t in zip(factors, out[:3], strict=True)) + (pull * out.sae_out).sum()
    actual_grads = torch.autograd.grad(total, inputs)
    for actual, want in zip(out, expected, strict=True):
        assert_close(actual, want, rtol=1e-10, atol=1e-10)
    for actual, want in zip(actual_grads, expected_grads, strict=True):
        assert_close(actual, want, rtol=1e-10, atol=1e-10)
    assert_close(out.loss, sum(expected[:3]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dense", [True, False])
def test_slopes_give_the_gradient_of_the_concave_penalty(dense: bool) -> None:
    # MCP: phi(h) = h - h^2 / (2 a tau) up to a tau, then constant. Its slope, held constant, gives its gradient.
    p = make_parameters(8, 30)
    x, bend = make_batch(25, 8), torch.tensor(1.3, dtype=F64)
    h = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    assert (h > bend).any()
    penalty = torch.where(h < bend, h - h * h / (2 * bend), bend / 2).sum(dim=-1).mean()
    expected = gradients((h @ p["W_dec"] + p["b_dec"] - x).pow(2).sum(dim=-1).mean() + 0.6 * penalty, p)
    encode = sparse.encode_dense if dense else sparse.encode
    code: Any = encode(x, p["W_enc"], p["b_enc"], p["b_dec"])
    slopes = (1 - code.values / bend).clamp_min(0)
    out = sparse.loss(x, code, l1_weights=torch.full((30,), 0.6, dtype=F64), slopes=slopes, **p)
    for name, grad in gradients(out.loss, p).items():
        assert_close(grad, expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_gradcheck(apply_b_dec: bool, dense: bool) -> None:
    p = make_parameters(5, 9, bias=-0.2)
    x = make_batch(6, 5).requires_grad_()
    weights = torch.rand(9, dtype=F64, generator=torch.Generator().manual_seed(3), requires_grad=True)

    def step(x: Tensor, weights: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        p = dict(zip(NAMES, parameters, strict=True))
        encoder = (x, p["W_enc"], p["b_enc"], p["b_dec"] if apply_b_dec else None)
        code: Any = sparse.encode_dense(*encoder) if dense else sparse.encode(*encoder)
        assert 0 < int(code.feature_counts.sum()) < 6 * 9
        return tuple(
            sparse.loss(
                x, code, l1_weights=weights, l2_coefficient=0.3, apply_b_dec_to_input=apply_b_dec, **p
            )
        )

    assert torch.autograd.gradcheck(step, (x, weights, *(p[name] for name in NAMES)))


def test_hand_worked_step() -> None:
    # Two features, two tokens, d_in 1. pre = [[2, -1], [-1, 3]]: one active feature each, h = 2 and 3.
    p = {
        "W_enc": torch.tensor([[1.0, -2.0]], dtype=F64, requires_grad=True),
        "b_enc": torch.tensor([1.0, 1.0], dtype=F64, requires_grad=True),
        "W_dec": torch.tensor([[1.0], [-1.0]], dtype=F64, requires_grad=True),
        "b_dec": torch.zeros(1, dtype=F64, requires_grad=True),
    }
    x = torch.tensor([[1.0], [-1.0]], dtype=F64)
    p["b_enc"].data = torch.tensor([1.0, 1.0], dtype=F64)
    code = encode(x, p)
    assert code.tokens.tolist() == [0, 1]
    assert code.features.tolist() == [0, 1]
    assert code.values.tolist() == [2.0, 3.0]
    out = sparse.loss(x, code, l1_weights=torch.tensor([0.5, 2.0], dtype=F64), l2_coefficient=0.1, **p)
    # sae_out = 2, -3; residuals 1, -2; mse (1 + 4) / 2; l1 (0.5 * 2 + 2 * 3) / 2; l2 0.1 * (4 + 9) / 2
    assert [t.item() for t in out[:3]] == pytest.approx([2.5, 3.5, 0.65])
    out.loss.backward()
    # dL/dh = 2 r W_dec / B + u / B + 2 l2 h / B: 1 + .25 + .2 = 1.45 and 2 + 1 + .3 = 3.3
    assert_close(p["b_enc"].grad, torch.tensor([1.45, 3.3], dtype=F64))
    assert_close(p["W_enc"].grad, torch.tensor([[1.45, -3.3]], dtype=F64))
    assert_close(p["W_dec"].grad, torch.tensor([[2.0], [-6.0]], dtype=F64))
    # through the reconstruction: (1 - 2) = -1; through the encoder: -(1 * 1.45 - 2 * 3.3) = 5.15
    assert_close(p["b_dec"].grad, torch.tensor([4.15], dtype=F64))


def test_all_zero_code_trains_the_decoder_bias_only() -> None:
    p = make_parameters(4, 8, bias=-1e3)
    x = make_batch(5, 4)
    code = encode(x, p)
    assert code.nnz == 0
    assert code.l0.item() == 0
    out = sparse.loss(x, code, l1_weights=torch.ones(8, dtype=F64), l2_coefficient=1.0, **p)
    grads = gradients(out.loss, p)
    assert_close(out.mse_loss, (p["b_dec"] - x).pow(2).sum(dim=-1).mean())
    assert all(not grads[name].any() for name in ("W_enc", "b_enc", "W_dec"))
    assert_close(grads["b_dec"], 2 * (p["b_dec"].detach() - x).mean(dim=0))
    assert code.to_dense().shape == (5, 8)


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_equals_saelens_standard_training_sae(apply_b_dec: bool) -> None:
    cfg = StandardTrainingSAEConfig(
        d_in=12, d_sae=60, l1_coefficient=0.7, dtype="float64", apply_b_dec_to_input=apply_b_dec
    )
    sae = StandardTrainingSAE(cfg)
    p = make_parameters(12, 60, bias=-1.0)  # decoder rows of unequal norm: their gradient counts
    sae.load_state_dict({name: value.detach() for name, value in p.items()})
    x = make_batch(31, 12)
    expected = sae.training_forward_pass(step_input(x, l1=0.7))
    expected.loss.backward()
    code = encode(x, p, apply_b_dec_to_input=apply_b_dec)
    out = sparse.loss(x, code, l1_weights=0.7 * p["W_dec"].norm(dim=1), apply_b_dec_to_input=apply_b_dec, **p)
    assert_close(out.mse_loss, expected.losses["mse_loss"])
    assert_close(out.l1_loss, expected.losses["l1_loss"])
    assert_close(out.sae_out, expected.sae_out)
    for name, grad in gradients(out.loss, p).items():
        assert_close(grad, getattr(sae, name).grad, rtol=1e-10, atol=1e-10)


def test_half_precision_batch_is_cast_to_the_parameters() -> None:
    p = make_parameters(8, 32, bias=-1.0, dtype=torch.float32)
    x = make_batch(16, 8).bfloat16()
    out = sparse.loss(x, encode(x, p), **p)
    want = sparse.loss(x.float(), encode(x.float(), p), **p)
    assert_close(out.loss, want.loss, rtol=0, atol=0)


def test_feature_major_parameter_gets_its_gradient_without_a_copy() -> None:
    p = make_parameters(6, 20)
    before = p["W_enc"].detach().clone()
    sparse.feature_major_(p["W_enc"])
    assert torch.equal(p["W_enc"], before)
    x = make_batch(10, 6)
    sparse.loss(x, encode(x, p), **p).loss.backward()
    assert p["W_enc"].grad is not None
    assert p["W_enc"].grad.stride() == p["W_enc"].stride() == (1, 6)


def test_a_step_under_torch_compile_equals_eager() -> None:
    p = make_parameters(6, 20, bias=-0.5)
    x = make_batch(10, 6)

    def step(x: Tensor) -> Tensor:
        return 2 * sparse.loss(x, encode(x, p), **p).loss

    assert_close(torch.compile(step, backend="eager")(x), step(x))
