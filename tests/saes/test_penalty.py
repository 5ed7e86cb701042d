from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from aen_lightning.saes.penalty import (
    adaptive_weights,
    coefficients_from_paper,
    coefficients_to_paper,
    elastic_net_terms,
    penalty_concavity,
    penalty_slopes,
    starvation_guard,
    warmup_ramp,
)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e6])
def test_adaptive_weights_do_not_depend_on_activation_units(unit: float):
    ema = unit * torch.tensor([4.0, 2.0, 0.0])
    # by hand: the top 1 of 3 gives r = 4, so 4/4, 4/2, and the cap for the silent one
    weights = adaptive_weights(ema, gamma=1.0, reference_fraction=0.34, weight_min=0.01, weight_max=10.0)
    assert_close(weights, torch.tensor([1.0, 2.0, 10.0]))


def test_adaptive_weights_by_hand_with_two_reference_features_and_a_square_root():
    ema = torch.tensor([9.0, 7.0, 2.0, 0.5])
    # floor(4 * 0.5) = 2 reference features: r = (9 + 7) / 2 = 8; weights sqrt(8/9), sqrt(8/7), 2, 4
    weights = adaptive_weights(ema, gamma=0.5, reference_fraction=0.5, weight_min=0.95, weight_max=3.0)
    assert_close(weights, torch.tensor([0.95, (8 / 7) ** 0.5, 2.0, 3.0]))


def test_adaptive_weights_reference_counts_at_least_one_feature():
    weights = adaptive_weights(
        torch.tensor([1.0, 4.0]), gamma=1.0, reference_fraction=0.01, weight_min=0.01, weight_max=10
    )
    assert_close(weights, torch.tensor([4.0, 1.0]))


def test_adaptive_weights_of_nothing_but_silent_features_are_one():
    weights = adaptive_weights(
        torch.zeros(5), gamma=1.0, reference_fraction=0.2, weight_min=0.01, weight_max=10.0
    )
    assert_close(weights, torch.ones(5))


def test_gamma_zero_is_the_plain_elastic_net():
    weights = adaptive_weights(
        torch.rand(50), gamma=0.0, reference_fraction=0.1, weight_min=0.01, weight_max=10.0
    )
    assert_close(weights, torch.ones(50))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01])
def test_adaptive_weights_refuse_a_fraction_outside_its_range(fraction: float):
    with pytest.raises(ValueError, match=rf"reference_fraction must be in \(0, 1\], got {fraction}"):
        adaptive_weights(
            torch.ones(3), gamma=1.0, reference_fraction=fraction, weight_min=0.1, weight_max=10.0
        )


def test_starvation_guard_by_hand():
    # mean rate .0278, a tenth of it .00278: the third feature is above that, the second pays .001 / .00278 of
    # its penalty
    rates = torch.tensor([0.0, 0.001, 0.0102, 0.1], dtype=torch.float64)
    expected = torch.tensor([0.02, 0.001 / 0.00278, 1, 1], dtype=torch.float64)
    for unit in (1.0, 1e-4):  # rates count relative to each other
        torch.testing.assert_close(starvation_guard(unit * rates, fraction=0.1, minimum=0.02), expected)
    assert torch.equal(starvation_guard(torch.zeros(3), fraction=0.1, minimum=0.02), torch.ones(3))


@pytest.mark.parametrize(
    ("n_steps", "delay", "ramp", "expected"),
    [
        (1, 0, 2000, 1.0),
        (1, -5, 2000, 1.0),
        (3999, 4000, 2000, 0.0),
        (4000, 4000, 2000, 0.0),
        (4001, 4000, 2000, 1 / 2000),
        (5000, 4000, 2000, 0.5),
        (6000, 4000, 2000, 1.0),
        (9999, 4000, 2000, 1.0),
        (9, 10, 0, 0.0),
        (10, 10, 0, 1.0),
    ],
)
def test_warmup_ramp_by_hand(n_steps: int, delay: int, ramp: int, expected: float):
    assert warmup_ramp(n_steps, delay_steps=delay, ramp_steps=ramp) == expected


def test_elastic_net_terms_by_hand():
    feature_acts = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    l1, l2 = elastic_net_terms(feature_acts, torch.tensor([3.0, 0.5]))
    assert l1.item() == (3 + 1 + 0 + 2) / 2
    assert l2.item() == (1 + 4 + 0 + 16) / 2


def test_elastic_net_terms_sum_half_precision_in_float32():
    feature_acts = torch.full((1, 4096), 1.0078125, dtype=torch.bfloat16)  # exact in bfloat16
    l1, l2 = elastic_net_terms(feature_acts, torch.ones(4096))
    assert l1.dtype == l2.dtype == torch.float32
    assert l1.item() == 4096 * 1.0078125


def test_no_gradient_flows_through_the_weights():
    weights = torch.ones(3, requires_grad=True)
    acts = torch.rand(2, 3, requires_grad=True)
    elastic_net_terms(acts, weights)[0].backward()
    assert weights.grad is None
    assert acts.grad is not None


@given(
    d_in=st.integers(1, 8192),
    lambda_1=st.floats(1e-6, 1.0),
    lambda_2=st.floats(1e-6, 1.0),
)
def test_paper_coefficients_round_trip(d_in: int, lambda_1: float, lambda_2: float):
    l1, l2 = coefficients_from_paper(d_in=d_in, lambda_1=lambda_1, lambda_2=lambda_2)
    assert coefficients_to_paper(d_in=d_in, l1_coefficient=l1, l2_coefficient=l2) == pytest.approx(
        (lambda_1, lambda_2)
    )


def test_llama_coefficients_as_worked_out_by_hand():
    assert coefficients_from_paper(d_in=4096, lambda_1=5e-4, lambda_2=1e-4) == pytest.approx((2.048, 0.4096))


@pytest.mark.parametrize(
    ("penalty", "shape", "expected"),
    [
        ("l1", 2.0, [1, 1, 1, 1, 1]),
        # tau = 2: (1 - h / 4)+
        ("mcp", 2.0, [1, 0.75, 0.5, 0.25, 0]),
        # 1 up to 2, then (6 - h)+ / 4
        ("scad", 3.0, [1, 1, 1, 0.75, 0]),
        # 4 / (4 + h)
        ("log", 2.0, [1, 4 / 5, 4 / 6, 4 / 7, 4 / 14]),
    ],
)
def test_penalty_slopes_by_hand(penalty: str, shape: float, expected: list[float]):
    h = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])
    slopes = penalty_slopes(h, penalty=penalty, scale=torch.tensor(2.0), shape=shape)  # type: ignore[arg-type]
    assert_close(slopes, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(("penalty", "shape"), [("mcp", 2.0), ("scad", 3.7), ("log", 1.5)])
def test_concavity_is_the_steepest_fall_of_the_slope(penalty: str, shape: float):
    h = torch.linspace(0, 20, 20001, dtype=torch.float64)
    tau = torch.tensor(1.3, dtype=torch.float64)
    slopes = penalty_slopes(h, penalty=penalty, scale=tau, shape=shape)  # type: ignore[arg-type]
    steepest = -(slopes.diff() / h.diff()).min()
    found = penalty_concavity(penalty=penalty, scale=tau, shape=shape)  # type: ignore[arg-type]
    assert_close(found, steepest, rtol=2e-3, atol=0)
