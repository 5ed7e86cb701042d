"""The exact coding problem, and what a dictionary's own codes lose against it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.testing import assert_close

from aen_lightning.diagnostics import (
    CodingProblem,
    coding_gap,
    coding_gap_bound,
    coding_objective,
    coding_problem,
    solve_coding,
)
from aen_lightning.diagnostics.coding import solve_on_support
from aen_lightning.saes.penalty import adaptive_weights
from tests.support.dictionaries import F64, generator, orthonormal, relu_dictionary


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_coding_on_an_orthonormal_dictionary_is_the_soft_threshold(l2: float):
    W = orthonormal(12, 16)
    y = 2 * torch.randn(20, 16, dtype=F64, generator=generator(1))
    l1 = 0.2 + torch.rand(12, dtype=F64, generator=generator(2))
    # ||y - hW||^2 + c.h + l2 ||h||^2 splits into coordinates z = y.w: h = (z - c/2)+ / (1 + l2)
    expected = (y @ W.T - l1 / 2).clamp_min(0) / (1 + l2)
    code = solve_coding(y, W, l1=l1, l2=l2)
    assert_close(code.feature_acts, expected, atol=1e-10, rtol=0)
    assert code.gap.max() < 1e-10
    assert_close(code.objective, coding_objective(y, W, expected, l1=l1, l2=l2), atol=1e-10, rtol=0)


def test_coding_gap_section_is_exact_where_the_answer_is_known():
    W = orthonormal(12, 16)
    x = 2 * torch.randn(50, 16, dtype=F64, generator=generator(1))
    b_dec = torch.randn(16, dtype=F64, generator=generator(3))
    l1, l2 = torch.full((12,), 0.7, dtype=F64), 0.25
    best = ((x - b_dec) @ W.T - l1 / 2).clamp_min(0) / (1 + l2)
    section, exact = coding_gap(x, best, W, b_dec, CodingProblem(l1, l2, 1.0, "test"))
    assert_close(exact.feature_acts, best, atol=1e-10, rtol=0)
    assert section["excess_pct"]["max"] < 1e-8
    assert section["support"]["jaccard"] == 1
    # an encoder that does not shrink: right features, magnitudes too large by a known amount
    plain = (best > 0) * ((x - b_dec) @ W.T)
    section, _ = coding_gap(x, plain, W, b_dec, CodingProblem(l1, l2, 1.0, "test"))
    excess = coding_objective(x - b_dec, W, plain, l1=l1, l2=l2) - coding_objective(
        x - b_dec, W, best, l1=l1, l2=l2
    )
    assert section["objective"]["encoder"] - section["objective"]["exact"] == pytest.approx(
        excess.mean().item(), abs=1e-10
    )
    assert section["from_magnitudes_share"] == pytest.approx(1, abs=1e-9)
    assert section["from_support_share"] == pytest.approx(0, abs=1e-9)
    # an encoder that misses one feature: found in the support
    misses = best.clone()
    misses[:, 3] = 0
    section, _ = coding_gap(
        x, misses, W, b_dec, CodingProblem(l1, l2, 1.0, "test"), dead=torch.arange(12) == 3
    )
    assert section["from_support_share"] == pytest.approx(1, abs=1e-9)
    assert section["starvation"]["dead_used_by_exact"] == 1
    assert section["starvation"]["features_only_exact"] == 1


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([(6, 4), (20, 8), (40, 10)]),
    st.sampled_from([0.0, 1e-3, 0.5]),
    st.floats(0.05, 2),
)
def test_exact_codes_meet_the_optimality_conditions(seed: int, shape: tuple[int, int], l2: float, l1: float):
    W = normalize(torch.randn(*shape, dtype=F64, generator=generator(seed)), dim=-1)
    y = torch.randn(5, shape[1], dtype=F64, generator=generator(seed + 1))
    code = solve_coding(y, W, l1=l1, l2=l2)
    h = code.feature_acts
    slope = -2 * (y - h @ W) @ W.T + 2 * l2 * h + l1
    assert (h >= 0).all()
    tolerance = 1e-9
    assert (slope[h > 0].abs() < tolerance).all()
    assert (slope[h == 0] > -tolerance).all()
    assert code.gap.max() < 1e-9


def test_gap_bounds_the_distance_to_the_optimum_at_any_code():
    W = normalize(torch.randn(30, 8, dtype=F64, generator=generator(0)), dim=-1)
    y = torch.randn(40, 8, dtype=F64, generator=generator(1))
    for l2 in (0.0, 1e-3, 0.2):
        best = solve_coding(y, W, l1=0.4, l2=l2)
        h = (torch.rand(40, 30, dtype=F64, generator=generator(2)) - 0.7).clamp_min(0)
        objective, gap = coding_gap_bound(y, W, h, l1=torch.full((30,), 0.4, dtype=F64), l2=l2)
        assert (objective - best.objective <= gap + 1e-12).all()
        near = (
            best.feature_acts * (1 + 0.01 * torch.randn(40, 30, dtype=F64, generator=generator(3)))
        ).clamp_min(0)
        objective, gap = coding_gap_bound(y, W, near, l1=torch.full((30,), 0.4, dtype=F64), l2=l2)
        assert (objective - best.objective <= gap + 1e-12).all()
        # at the optimum the bound is tight, from both sides
        _, gap = coding_gap_bound(y, W, best.feature_acts, l1=torch.full((30,), 0.4, dtype=F64), l2=l2)
        assert gap.abs().max() < 1e-10


def test_dependent_atoms_share_the_load_and_have_an_exact_answer_all_the_same():
    atoms, c = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.full((2,), 0.1)
    # symmetric: (1 - 2a)^2 + 0.2 a + 2 l2 a^2 is least at a = 3.8 / (8 + 4 l2), here with l2 = 0.5
    assert_close(solve_on_support(torch.tensor([1.0, 0.0]), atoms, c, 0.5), torch.full((2,), 0.38, dtype=F64))
    y = torch.tensor([[1.0, 0.0]], dtype=F64)
    code = solve_coding(y, atoms.double(), l1=0.1, l2=0.0)
    assert code.feature_acts.sum().item() == pytest.approx(0.95, abs=1e-9)  # 1 - 0.1 / 2, shared somehow
    assert code.gap.item() < 1e-9
    # nothing is worth its price
    assert solve_on_support(torch.tensor([1.0, 0.0]), atoms, 3 * torch.ones(2), 0.0).tolist() == [0, 0]
    assert solve_on_support(y[0], atoms[:0], c[:0], 0.1).shape == (0,)


def test_coding_problem_refuses_what_has_no_solution():
    y, W = torch.ones(1, 2), torch.eye(2)
    with pytest.raises(ValueError, match="l1 > 0 and l2 >= 0"):
        solve_coding(y, W, l1=0.0, l2=0.1)
    with pytest.raises(ValueError, match="must fit"):
        solve_coding(torch.ones(1, 3), W, l1=0.1, l2=0.1)


def test_coding_problem_of_a_trained_dictionary_is_that_of_its_training():
    details = {
        "l1_coefficient": 0.4,
        "l2_coefficient": 0.02,
        "gamma": 0.5,
        "reference_fraction": 0.1,
        "weight_min": 0.01,
        "weight_max": 10,
    }
    sae = relu_dictionary(8, 20, **details)
    means = torch.rand(20, generator=generator(5))
    problem = coding_problem(sae, mean_feature_acts=means)
    u = adaptive_weights(means.double(), gamma=0.5, reference_fraction=0.1, weight_min=0.01, weight_max=10)
    assert_close(problem.l1, 0.4 * u)
    assert problem.l2 == 0.02
    assert_close(coding_problem(sae, l1_weights=torch.full((20,), 3.0)).l1, torch.full((20,), 1.2, dtype=F64))
    with pytest.raises(ValueError, match="adaptive weights, which its weights file does not hold"):
        coding_problem(sae)
    sae.cfg.metadata.training_architecture, sae.cfg.metadata.training_architecture_details = "topk", {"k": 3}
    with pytest.raises(ValueError, match=r"trained as topk\) states None"):
        coding_problem(sae)


def test_a_folded_average_scale_leaves_the_coding_gap_as_it_is():
    """Raw space is scaled space over the factor; objective and codes must not know the difference."""
    details = {"l1_coefficient": 0.4, "l2_coefficient": 0.02, "gamma": 0.0}
    x = 2 * torch.randn(30, 8, generator=generator(0))
    gaps = []
    for factor in (1.0, 7.0):
        sae = relu_dictionary(8, 20, **details)
        acts = sae.encode(x)
        sae.fold_activation_norm_scaling_factor(factor)
        assert_close(sae.encode(x / factor), acts)
        section, _ = coding_gap(x / factor, acts, sae.W_dec, sae.b_dec, coding_problem(sae))
        gaps.append(section)
    for key in ("objective", "excess_pct", "l0"):
        for name, value in gaps[0][key].items():
            assert gaps[1][key][name] == pytest.approx(value, rel=1e-5)
