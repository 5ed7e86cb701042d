"""The certified bound, and what is kept by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aen_lightning import sparse
from aen_lightning.sparse.screening import screen_features, screen_tokens
from tests.support.sparse_problem import encode, make_batch, make_parameters


@settings(max_examples=60, deadline=None)
@given(
    d_in=st.integers(1, 200),
    x_scale=st.sampled_from([1e-6, 1.0, 1e4]),
    bias=st.sampled_from([-3.0, -0.5, 0.0, 0.5]),
    seed=st.integers(0, 2**16),
)
def test_screening_bound_is_never_below_the_pre_activation(
    d_in: int, x_scale: float, bias: float, seed: int
) -> None:
    p = make_parameters(d_in, 96, bias=bias, seed=seed, dtype=torch.float32)
    x = x_scale * make_batch(48, d_in, seed + 1, dtype=torch.float32)
    x[0] = 0
    weight = p["W_enc"].detach().t().contiguous()
    b_enc = p["b_enc"].detach() * x_scale
    upper = screen_features(weight, weight.norm(dim=1), b_enc) @ screen_tokens(x).t()
    exact = weight.double() @ x.double().t() + b_enc.double()[:, None]
    assert not ((exact > 0) & (upper <= 0)).any()
    # and it is worth something: well under 5 % of |x| |w| above the truth
    slack = 0.02 * weight.double().norm(dim=1)[:, None] * x.double().norm(dim=1) + 0.02 * exact.abs()
    slack += 1e-3 * b_enc.double().abs()[:, None]
    assert (upper.double() <= exact + slack).all()


def test_screening_bound_holds_where_rounding_is_worst() -> None:
    # Every entry halfway between two bfloat16 numbers, all errors with one sign: the bound must be tight and safe.
    d_in = 64
    x = torch.full((1, d_in), 1 + 2.0**-8 + 2.0**-20)  # rounds up by almost half a unit in the last place
    weight = torch.full((1, d_in), -(1 + 2.0**-8 + 2.0**-20))
    dot = float(x.double() @ weight.double().t())
    for margin in (1e-4, 1e-3, 1e-2):
        bias = torch.tensor([-dot + margin])
        upper = screen_features(weight, weight.norm(dim=1), bias) @ screen_tokens(x).t()
        assert upper.item() > 0


@pytest.mark.parametrize("feature_major", [False, True])
def test_screened_code_equals_the_plain_code(feature_major: bool) -> None:
    p = make_parameters(64, 1024, bias=-2.2, dtype=torch.float32)
    if feature_major:
        sparse.feature_major_(p["W_enc"])
    x = make_batch(256, 64, dtype=torch.float32)
    x[3] *= 1e4  # an attention sink must not spoil the bound of the other tokens
    plain, screened = encode(x, p, screen=False), encode(x, p, screen=True)
    h64 = torch.relu((x.double() - p["b_dec"].double()) @ p["W_enc"].double() + p["b_enc"].double())
    rounding = 1e-6 * x.double().norm(dim=1, keepdim=True)  # of a float32 sum of this size
    for code in (plain, screened):
        assert ((code.to_dense().double() - h64).abs() <= rounding).all()
    assert 0 < screened.density < 0.02  # the screened path, not its fallback
    assert torch.equal(screened.feature_counts, screened.feature_offsets.diff())


def test_screening_falls_back_to_the_full_product_when_most_features_fire() -> None:
    p = make_parameters(16, 64, bias=1.0, dtype=torch.float32)
    x = make_batch(32, 16, dtype=torch.float32)
    assert torch.equal(encode(x, p, screen=True).to_dense(), encode(x, p, screen=False).to_dense())


def test_screening_needs_a_float32_product() -> None:
    p = make_parameters(8, 16)
    with pytest.raises(
        ValueError, match=r"screen=True needs a float32 encoder product, but this one is torch\.float64"
    ):
        encode(make_batch(4, 8), p, screen=True)
