"""The gated objective against its formula in dense autograd, float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from aen_lightning import sparse
from tests.support.sparse_problem import F64, gradients, make_batch, make_parameters


def gated_parameters(d_in: int, d_sae: int, bias: float, seed: int) -> dict[str, nn.Parameter]:
    p = make_parameters(d_in, d_sae, bias=bias, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    p["b_gate"] = p.pop("b_enc")
    for name in ("r_mag", "b_mag"):
        p[name] = nn.Parameter(0.5 * torch.randn(d_sae, dtype=F64, generator=generator))
    return p


def dense_gated(
    x: Tensor, p: dict[str, Any], weights: Tensor, l2: float, apply_b_dec: bool, slope: Any
) -> tuple[Tensor, ...]:
    u = (x - p["b_dec"] if apply_b_dec else x) @ p["W_enc"]
    pi = u + p["b_gate"]
    s = torch.relu(pi)
    h = (pi > 0) * torch.relu(p["r_mag"].exp() * u + p["b_mag"])
    sae_out = h @ p["W_dec"] + p["b_dec"]
    gate_out = s @ p["W_dec"].detach() + p["b_dec"].detach()
    return (
        (sae_out - x).pow(2).sum(dim=-1).mean(),
        (gate_out - x).pow(2).sum(dim=-1).mean(),
        (weights * slope(s.detach()) * s).sum(dim=-1).mean(),
        l2 * s.pow(2).sum(dim=-1).mean(),
        sae_out,
        h,
    )


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 20),
    d_in=st.integers(1, 12),
    d_sae=st.integers(1, 50),
    bias=st.sampled_from([-100.0, -1.0, 0.0, 3.0]),
    l2=st.sampled_from([0.0, 0.3]),
    apply_b_dec=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_gated_loss_and_gradients_equal_dense_autograd(
    batch: int, d_in: int, d_sae: int, bias: float, l2: float, apply_b_dec: bool, seed: int
) -> None:
    p = gated_parameters(d_in, d_sae, bias, seed)
    x = make_batch(batch, d_in, seed + 1)
    weights = torch.rand(d_sae, dtype=F64, generator=torch.Generator().manual_seed(seed))

    def slope(s: Tensor) -> Tensor:
        return (1 - s / 2).clamp_min(0)

    factors = (1.0, 2.0, 3.0, 4.0)  # unequal, so that no term can stand in for another
    expected = dense_gated(x, p, weights, l2, apply_b_dec, slope)
    expected_grads = gradients(sum(f * t for f, t in zip(factors, expected[:4], strict=True)), p)
    code = sparse.encode(x, p["W_enc"], p["b_gate"], p["b_dec"] if apply_b_dec else None, block_elements=64)
    out = sparse.gated_loss(
        x,
        code,
        **p,
        l1_weights=weights,
        slopes=slope(code.values),
        l2_coefficient=l2,
        apply_b_dec_to_input=apply_b_dec,
    )
    for actual, want in zip(out[:5], expected[:5], strict=True):
        assert_close(actual, want, rtol=1e-10, atol=1e-10)
    assert_close(out.code.to_dense(), expected[5].detach(), rtol=1e-10, atol=1e-10)
    assert torch.equal(out.code.feature_counts, (expected[5] > 0).sum(dim=0))
    for name, grad in gradients(sum(f * t for f, t in zip(factors, out[:4], strict=True)), p).items():
        assert_close(grad, expected_grads[name], rtol=1e-10, atol=1e-10)


def test_open_gate_with_equal_heads_is_the_relu_sae_twice() -> None:
    # r_mag 0 and b_mag = b_gate: the heads are the same, so h = s
    p = gated_parameters(6, 30, -0.5, 0)
    with torch.no_grad():
        p["r_mag"].zero_()
        p["b_mag"].copy_(p["b_gate"])
    x = make_batch(11, 6)
    code = sparse.encode(x, p["W_enc"], p["b_gate"], p["b_dec"])
    out = sparse.gated_loss(x, code, **p, l1_weights=torch.ones(30, dtype=F64))
    relu = sparse.loss(
        x, code, p["W_enc"], p["b_gate"], p["W_dec"], p["b_dec"], l1_weights=torch.ones(30, dtype=F64)
    )
    assert_close(out.mse_loss, relu.mse_loss)
    assert_close(out.gate_mse_loss, relu.mse_loss)
    assert_close(out.l1_loss, relu.l1_loss)
    assert_close(out.loss, 2 * relu.mse_loss + relu.l1_loss)
    assert_close(out.code.to_dense(), code.to_dense())


def test_a_code_of_another_batch_is_refused() -> None:
    p = gated_parameters(4, 8, 0.0, 0)
    x = make_batch(3, 4)
    code = sparse.encode(x, p["W_enc"], p["b_gate"], p["b_dec"])
    with pytest.raises(ValueError, match=r"the code is \(3, 8\), but x and W_dec make .* = \(2, 8\)"):
        sparse.gated_loss(x[:2], code, **p)
