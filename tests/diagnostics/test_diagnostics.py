"""Diagnostics against closed forms, brute force and hand-worked numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY
from safetensors.torch import save_file
from torch.nn.functional import normalize
from torch.testing import assert_close

from aen_lightning import AENTrainingSAE, AENTrainingSAEConfig
from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.diagnostics import (
    CodingProblem,
    active_gram,
    coding_bound,
    coding_gap,
    coding_gap_bound,
    coding_map_lipschitz,
    coding_objective,
    coding_problem,
    coherence,
    compare_dictionaries,
    composition,
    diagnose_dictionary,
    encoder_lipschitz,
    solve_coding,
)
from aen_lightning.diagnostics.coding import solve_on_support, spectral_norm
from aen_lightning.diagnostics.stability import shared_subspace
from aen_lightning.evaluate import SyntheticInputs, load_dictionary, scaled_space, to_scaled_space
from aen_lightning.evaluate.results import write_result
from aen_lightning.metrics import match_features
from aen_lightning.saes.penalty import adaptive_weights
from tests.support.commands import compare_command, diagnose_command

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=generator(seed)))[0][:n]


def relu_dictionary(
    d_in: int, d_sae: int, *, seed: int = 0, normalize_activations: str = "none", **training: Any
) -> SAE[Any]:
    """A random SAELens dictionary with a unit decoder, tied encoder and metadata as training leaves them."""
    g = generator(seed)
    sae = SAE.from_dict(
        {
            "architecture": "standard", "d_in": d_in, "d_sae": d_sae, "normalize_activations": normalize_activations,
            "metadata": {"training_architecture": "aen", "training_architecture_details": training},
        }
    )  # fmt: skip
    W = normalize(torch.randn(d_sae, d_in, generator=g), dim=-1)
    state = {
        "W_dec": W,
        "W_enc": W.T.contiguous(),
        "b_enc": -0.3 * torch.ones(d_sae),
        "b_dec": torch.zeros(d_in),
    }
    sae.load_state_dict(state)
    return sae.requires_grad_(False)


# --- the exact coding problem -----------------------------------------------------------------------------
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


# --- Lipschitz --------------------------------------------------------------------------------------------
def test_coding_map_never_moves_more_than_the_bound_and_an_adversary_reaches_it():
    W = normalize(torch.randn(40, 8, dtype=F64, generator=generator(0)), dim=-1)
    x = 2 * torch.randn(20, 8, dtype=F64, generator=generator(1))
    problem = CodingProblem(torch.full((40,), 0.3, dtype=F64), 0.01, 1.0, "test")
    exact = solve_coding(x, W, l1=problem.l1, l2=problem.l2).feature_acts
    found = coding_map_lipschitz(x, exact, W, torch.zeros(8, dtype=F64), problem, n_directions=3)
    assert found["bound"] == coding_bound(0.01) == 5.0
    assert 0 < found["empirical"]["max"] <= found["bound"] + 1e-6
    assert found["local"]["max"] <= found["bound"] + 1e-9
    # one atom of length sqrt(l2) reaches it: dh/dy = s / (s^2 + l2) = 1 / (2 sqrt(l2))
    atom = 0.1 * torch.eye(1, 8, dtype=F64)
    one = CodingProblem(torch.full((1,), 1e-6, dtype=F64), 0.01, 1.0, "test")
    x = torch.eye(1, 8, dtype=F64)
    exact = solve_coding(x, atom, l1=one.l1, l2=one.l2).feature_acts
    found = coding_map_lipschitz(x, exact, atom, torch.zeros(8, dtype=F64), one)
    assert found["local"]["max"] == pytest.approx(5.0)
    assert coding_bound(0.0) == math.inf


def test_encoder_constants_by_hand():
    sae = relu_dictionary(3, 3)
    W = torch.diag(torch.tensor([3.0, 2.0, 0.5]))
    sae.load_state_dict({"W_dec": torch.eye(3), "W_enc": W, "b_enc": torch.zeros(3), "b_dec": torch.zeros(3)})
    x = torch.tensor([[-1.0, 1.0, 1.0], [-1.0, -1.0, 1.0]])
    found = encoder_lipschitz(sae, x, sae.encode(x), n_directions=64)
    assert found["bound"] == pytest.approx(3)
    assert found["is_continuous"]
    # active sets {1, 2} and {2}: locally 2 and 0.5
    assert (found["local"]["max"], found["local"]["min"]) == (pytest.approx(2), pytest.approx(0.5))
    assert found["local"]["min"] * 0.8 < found["empirical"]["min"] <= found["local"]["min"] + 1e-2
    assert found["empirical"]["max"] <= 2 + 1e-2
    # from one to the other only feature 1 changes, by 2 over a distance of 2
    assert found["between_inputs"]["max"] == pytest.approx(1)


def test_spectral_norm_is_that_of_torch():
    W = torch.randn(30, 70, generator=generator(0))
    assert spectral_norm(W) == pytest.approx(torch.linalg.matrix_norm(W, 2).item(), rel=1e-5)
    assert spectral_norm(W.T) == pytest.approx(spectral_norm(W))


# --- geometry ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coherence_in_chunks_is_that_of_the_whole_matrix(chunk_size: int, dtype: torch.dtype):
    W = (3 * torch.randn(64, 10, generator=generator(0))).to(dtype)
    unit = normalize(W.double(), dim=-1)
    cosines = (unit @ unit.T).abs().fill_diagonal_(-1)
    found = coherence(W, chunk_size=chunk_size)
    assert_close(found.max_abs_cosine.double(), cosines.max(dim=1).values, atol=1e-6, rtol=0)
    assert_close(
        cosines.gather(1, found.neighbour[:, None]).squeeze(1), cosines.max(dim=1).values, atol=1e-6, rtol=0
    )


def test_coherence_counts_opposite_atoms_and_says_which_are_twins():
    W = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [-3.0, 0, 0], [0, 0, 1.0]])
    found = coherence(W)
    assert found.max_abs_cosine.tolist() == [1, 0, 1, 0]
    summary = found.summary()
    assert summary["closest_pairs"][0] == [0, 2, 1.0]
    assert summary["share_above_0.9"] == 0.5
    with pytest.raises(ValueError, match="at least two atoms"):
        coherence(torch.ones(1, 4))


def test_active_gram_by_hand():
    # atoms e1, (e1 + e2)/sqrt 2 active; e2 and e3 inactive
    W = torch.tensor([[2.0, 0, 0], [1.0, 1.0, 0], [0, 5.0, 0], [0, 0, 1.0]])
    acts = torch.tensor([[1.0, 0.5, 0, 0], [0, 0, 0, 0]])
    found = active_gram(W, acts, chunk_size=3)
    c = math.sqrt(0.5)
    assert found["n_tokens"] == 1
    assert found["min_eigenvalue"]["mean"] == pytest.approx(1 - c, rel=1e-5)
    assert found["max_eigenvalue"]["mean"] == pytest.approx(1 + c, rel=1e-5)
    assert found["condition_number"]["mean"] == pytest.approx((1 + c) / (1 - c), rel=1e-5)
    # inactive e2 overlaps the second active atom by c; e3 none
    assert found["leakage"]["mean"] == pytest.approx(c, rel=1e-5)
    assert found["leakage_per_pair"]["mean"] == pytest.approx(c / 2, rel=1e-5)
    # e2 lies in the span of the active ones, e3 is orthogonal to it
    assert found["cross_leverage_max"]["mean"] == pytest.approx(1, rel=1e-5)
    assert found["cross_leverage_mean"]["mean"] == pytest.approx(0.5, rel=1e-5)


def test_active_gram_agrees_with_the_definitions_and_reports_dependent_atoms():
    W = normalize(torch.randn(50, 12, dtype=F64, generator=generator(0)), dim=-1)
    acts = (torch.rand(6, 50, generator=generator(1)) < 0.1).double()
    found = active_gram(W, acts, chunk_size=16)
    for name, of in (
        ("leakage", lambda A, rest: (rest @ A.T).norm()),
        ("cross_leverage_max", lambda A, rest: (rest @ torch.linalg.pinv(A) @ A).square().sum(-1).max()),
        ("max_eigenvalue", lambda A, rest: torch.linalg.eigvalsh(A @ A.T)[-1]),
    ):
        expected = torch.stack([of(W[a > 0], W[a == 0]) for a in acts])
        assert found[name]["mean"] == pytest.approx(expected.mean().item(), rel=1e-9)
    more_than_dimensions = active_gram(W, torch.ones(1, 50, dtype=F64))
    assert more_than_dimensions["min_eigenvalue"]["mean"] == 0
    assert more_than_dimensions["condition_number"]["mean"] is None


# --- composition ------------------------------------------------------------------------------------------
def test_composition_of_an_orthonormal_dictionary_loses_nothing_and_a_coherent_one_collapses():
    sae = relu_dictionary(16, 16)
    W = orthonormal(16, 16).float()
    sae.load_state_dict(
        {"W_dec": W, "W_enc": W.T.contiguous(), "b_enc": -0.25 * torch.ones(16), "b_dec": torch.ones(16)}
    )
    density, means = torch.full((16,), 0.1), torch.full((16,), 2.0)
    found = composition(sae, density, means, sizes=(1, 4, 16, 64), n_samples=10)
    assert found["sizes"] == [1, 4, 16]
    assert found["lost_share"] == [0, 0, 0]
    assert found["spurious"] == [0, 0, 0]
    assert found["magnitude_ratio"] == pytest.approx([1.75 / 2] * 3, rel=1e-5)
    # |h' - h| = 0.25 on each of k; over 2 on each of k
    assert found["relative_error"] == pytest.approx([0.125] * 3, rel=1e-5)
    assert found["reconstruction_error"] == pytest.approx([0.125**2] * 3, rel=1e-4)
    assert found["interference"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert found["spurious_energy"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert found["tied_spurious_energy"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert found["half_lost_at"] is None

    crowded = relu_dictionary(8, 64)
    collapse = composition(
        crowded, torch.full((64,), 0.1), torch.full((64,), 1.0), sizes=(1, 32), n_samples=20
    )
    assert collapse["interference"][0] == pytest.approx(0, abs=1e-6)
    assert collapse["interference"][1] > 1
    assert collapse["lost_share"][0] == 0 < collapse["lost_share"][1]


def test_composition_counts_spurious_features_and_leaves_dead_ones_out():
    sae = relu_dictionary(2, 3)
    twins = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    sae.load_state_dict(
        {"W_dec": twins, "W_enc": twins.T.contiguous(), "b_enc": torch.zeros(3), "b_dec": torch.zeros(2)}
    )
    # only feature 0 is live; its twin comes along with the same activation
    found = composition(
        sae, torch.tensor([0.5, 0.0, 0.0]), torch.tensor([2.0, 9.0, 9.0]), sizes=(1, 2), n_samples=3
    )
    assert found["sizes"] == [1]
    assert (found["spurious"], found["spurious_mass"], found["magnitude_ratio"]) == ([1], [0.5], [1])
    assert found["spurious_energy"] == [1]  # the twin's 2 squared over 2 squared
    assert found["tied_spurious_energy"] == [0]  # it is dead
    with pytest.raises(ValueError, match="no feature fired"):
        composition(sae, torch.zeros(3), torch.ones(3))


# --- stability --------------------------------------------------------------------------------------------
def test_matching_is_the_best_assignment_and_the_sparse_one_agrees_where_it_must():
    W = torch.randn(60, 20, generator=generator(0))
    other = torch.cat(
        [W[torch.randperm(60, generator=generator(1))], torch.randn(10, 20, generator=generator(2))]
    )
    other = other + 0.02 * torch.randn(other.shape, generator=generator(3))
    exact = match_features(W, other)
    near = match_features(W, other, dense_limit=0, n_neighbours=5, chunk_size=16)
    assert exact.exact
    assert not near.exact
    assert exact.cosine.min() > 0.98
    assert_close(near.second, exact.second)
    assert_close(near.cosine, exact.cosine, atol=1e-6, rtol=0)


def test_sparse_matching_with_all_neighbours_is_the_hungarian_answer():
    a, b = torch.randn(30, 6, generator=generator(0)), torch.randn(40, 6, generator=generator(1))
    exact, near = match_features(a, b), match_features(a, b, dense_limit=0, n_neighbours=40, chunk_size=7)
    assert near.cosine.sum().item() == pytest.approx(exact.cosine.sum().item(), abs=1e-5)


def test_compare_counts_what_is_found_again():
    W = orthonormal(8, 8).float()
    turned = W.clone()
    turned[:2] = -W[:2]  # an opposite direction is another feature
    found = compare_dictionaries(
        {"a": W, "b": W[torch.randperm(8, generator=generator(0))], "c": turned}, thresholds=(0.9,)
    )
    by_pair = {(p["a"], p["b"]): p["found_again"]["0.9"] for p in found["pairs"]}
    assert by_pair["a", "b"] == {"of_a": 1, "of_b": 1}
    assert by_pair["a", "c"] == {"of_a": 6 / 8, "of_b": 6 / 8}
    assert found["found_in_all"] == {"a": {"0.9": 6 / 8}, "b": {"0.9": 6 / 8}, "c": {"0.9": 6 / 8}}
    assert found["random_baseline"]["a"]["cosine"]["mean"] < 0.8
    live = {"a": torch.arange(8) >= 2, "b": torch.ones(8, dtype=torch.bool), "c": torch.arange(8) >= 2}
    found = compare_dictionaries({"a": W, "b": W, "c": turned}, live=live, thresholds=(0.9,), baseline=False)
    assert found["n_compared"] == {"a": 6, "b": 8, "c": 6}
    assert found["found_in_all"]["a"]["0.9"] == 1
    with pytest.raises(ValueError, match="at least two"):
        compare_dictionaries({"a": W})


def test_chance_is_not_fooled_by_a_dictionary_made_from_a_small_seed():
    for seed in (0, 42):
        W = torch.randn(64, 16, generator=generator(seed))
        assert compare_dictionaries({"a": W, "b": W})["random_baseline"]["a"]["cosine"]["max"] < 0.95


def test_random_directions_of_the_same_shape_give_what_chance_does():
    d_in, d_sae = 32, 512
    sae = relu_dictionary(d_in, d_sae)
    found = composition(sae, torch.full((d_sae,), 0.1), torch.ones(d_sae), sizes=(1, 8), n_samples=64)
    # each other direction reads a normal number of variance |h|^2 / d_in, of whose square half is positive
    expected = [(d_sae - k) / (2 * d_in) for k in (1, 8)]
    assert found["random_sphere"]["tied_spurious_energy"] == pytest.approx(expected, rel=0.15)
    assert found["random_sphere"]["interference"][0] == pytest.approx(0, abs=1e-6)
    # a dictionary of such directions is not told from its control
    assert found["tied_spurious_energy"] == pytest.approx(expected, rel=0.15)


def test_unstable_features_may_share_a_subspace():
    def directions(n: int, dims: slice, seed: int) -> torch.Tensor:
        W = torch.zeros(n, 12, dtype=F64)
        W[:, dims] = torch.randn(n, len(range(12)[dims]), dtype=F64, generator=generator(seed))
        return W

    same = shared_subspace(directions(200, slice(0, 3), 0), directions(300, slice(0, 3), 1), energy=0.99)
    assert (same["n_a"], same["n_b"], same["rank_a"], same["rank_b"]) == (200, 300, 3, 3)
    assert same["a_in_b"] == pytest.approx(1)
    assert same["b_in_a"] == pytest.approx(1)
    assert same["a_in_b_by_chance"] == 3 / 12
    apart = shared_subspace(directions(200, slice(0, 3), 0), directions(200, slice(3, 7), 1), energy=0.99)
    assert apart["rank_b"] == 4
    assert apart["a_in_b"] == pytest.approx(0)
    # half of the second's plane: e1 + e2 and e1 - e2 span e1, e2; of a = e1, e3 the plane holds e1 alone
    a, b = torch.eye(12)[[0, 2]], torch.tensor([[1.0, 1.0], [1.0, -1.0]]) @ torch.eye(12)[:2]
    assert shared_subspace(a, b, energy=1.0)["a_in_b"] == pytest.approx(0.5)
    shuffled = compare_dictionaries(
        {"a": directions(40, slice(0, 3), 2), "b": directions(40, slice(0, 3), 3)}, thresholds=(0.9999,)
    )
    left = shuffled["pairs"][0]["unstable"]
    assert left["threshold"] == 0.9999
    assert left["a_in_b"] > 0.8 > 0.3 > left["a_in_b_by_chance"]
    W = torch.eye(12)
    assert compare_dictionaries({"a": W, "b": W})["pairs"][0]["unstable"] is None


# --- the commands -----------------------------------------------------------------------------------------
@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A dictionary exported from a training SAE on spiked data, after a few steps of its own forward pass."""
    torch.manual_seed(0)
    data = SpikedDataModule(d_in=16, n_features=32, k=3, seed=1)
    cfg = AENTrainingSAEConfig(
        d_in=16, d_sae=48, l1_coefficient=0.3, l2_coefficient=0.05, decoder_init_norm=1.0
    )
    for key, value in data.sae_metadata.items():
        cfg.metadata[key] = value
    sae = AENTrainingSAE(cfg)
    sae.save_inference_model(tmp_path / "a")
    sae.save_model(tmp_path / "training")
    torch.manual_seed(1)
    AENTrainingSAE(cfg).save_inference_model(tmp_path / "b")
    return tmp_path


def test_diagnose_command_writes_all_sections(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        diagnose_command([str(trained / "a"), "--n-tokens", "256", "--n-sample", "16", "--n-lipschitz", "4"])
        == 0
    )
    result = json.loads((trained / "a" / "diagnosis.json").read_text())
    assert result["command"] == "diagnose"
    assert result["skipped"] == {}
    for section in ("coherence", "active_gram", "lipschitz", "coding_gap", "composition"):
        assert result[section], section
    assert result["coding_gap"]["certificate"]["max_relative_gap"] < 1e-9
    assert result["lipschitz"]["coding_map"]["bound"] == pytest.approx(0.5 / math.sqrt(0.05))
    assert (
        result["lipschitz"]["coding_map"]["empirical"]["max"]
        <= result["lipschitz"]["coding_map"]["bound"] + 1e-6
    )
    text = capsys.readouterr().out
    assert "objective above optimum" in text
    assert "features active together" in text


def test_diagnose_command_takes_weights_from_a_training_checkpoint_and_only_what_is_asked(trained: Path):
    weights = str(trained / "training" / "sae_weights.safetensors")
    out = trained / "gap.json"
    args = [
        str(trained / "a"),
        "--only",
        "coding_gap",
        "--n-tokens",
        "64",
        "--n-sample",
        "4",
        "--out",
        str(out),
    ]
    assert diagnose_command([*args, "--l1-weights", weights]) == 0
    result = json.loads(out.read_text())
    assert result["coding_gap"]["source"].endswith("adaptive weights given")
    assert result["coding_gap"]["l1_coefficient_mean"] == pytest.approx(0.3)
    assert result["composition"] is None
    save_file({"x": torch.ones(1)}, trained / "other.safetensors")
    with pytest.raises(ValueError, match="has no tensor l1_weights; it has x"):
        diagnose_command([*args, "--l1-weights", str(trained / "other.safetensors")])


def test_diagnose_without_inputs_gives_the_coherence_only(trained: Path):
    result = diagnose_dictionary(load_dictionary(trained / "a"), None)
    assert result["coherence"]["max"] > 0
    assert set(result["skipped"]) == {"active_gram", "lipschitz", "coding_gap", "composition"}
    with pytest.raises(ValueError, match="no section 'coherenc'"):
        diagnose_dictionary(load_dictionary(trained / "a"), None, sections=["coherenc"])


def test_diagnosis_is_the_same_whether_tokens_come_scaled_or_not():
    """With ``constant_norm_rescale`` everything is measured after the dictionary's own scaling."""
    details = {"l1_coefficient": 0.4, "l2_coefficient": 0.02, "gamma": 0.0}
    data = SpikedDataModule(d_in=8, n_features=20, k=3, seed=1)
    inputs = SyntheticInputs(data, n_samples=128)
    results = []
    for factor in (1.0, 5.0):
        inputs.x *= factor
        sae = relu_dictionary(8, 20, normalize_activations="constant_norm_rescale", **details)
        x = to_scaled_space(sae, inputs.x)
        assert_close(x.norm(dim=-1), torch.full((len(x),), 8**0.5))
        with scaled_space(sae):
            assert_close(sae.encode(x), relu_dictionary(8, 20).encode(x))
        results.append(diagnose_dictionary(sae, inputs, n_sample=16, n_lipschitz=4))
    for section in ("active_gram", "coding_gap", "composition"):
        a, b = (json.loads(json.dumps(r[section]), parse_float=lambda s: round(float(s), 3)) for r in results)
        a.pop("certificate", None), b.pop("certificate", None)
        assert a == b


@pytest.mark.parametrize("architecture", sorted(a for a in SAE_CLASS_REGISTRY if "transcoder" not in a))
def test_every_architecture_of_saelens_is_diagnosed_or_refused_with_a_reason(
    architecture: str, tmp_path: Path
):
    torch.manual_seed(0)
    fields = {"k": 4, "n_heads": 2, "sae_diff_type": "topk", "kval_topk": 4, "bottleneck_factor": 2}
    sae = SAE.from_dict({"architecture": architecture, "d_in": 16, "d_sae": 40, "metadata": {}, **fields})
    for parameter in sae.parameters():
        parameter.data.normal_(0, 0.3)
    sae.save_model(tmp_path)
    inputs = SyntheticInputs(SpikedDataModule(d_in=16, n_features=40, k=3), n_samples=128)
    if architecture == "temporal":
        with pytest.raises(ValueError, match="depend on the tokens before"):
            diagnose_dictionary(load_dictionary(tmp_path), inputs)
        return
    result = diagnose_dictionary(
        load_dictionary(tmp_path), inputs, n_sample=8, n_lipschitz=2, l1_coefficient=0.3
    )
    assert set(result["skipped"]) == ({"coding_gap"} if architecture == "abstopk" else set())
    if architecture != "abstopk":
        assert (
            result["coding_gap"]["objective"]["exact"]
            <= result["coding_gap"]["objective"]["best_on_support"] + 1e-12
        )
        assert (
            result["coding_gap"]["objective"]["best_on_support"]
            <= result["coding_gap"]["objective"]["encoder"] + 1e-12
        )
    write_result(result, tmp_path / "diagnosis.json")  # no nan in it


def test_compare_command(trained: Path, capsys: pytest.CaptureFixture[str]):
    out = trained / "compare.json"
    assert compare_command([str(trained / "a"), str(trained / "b"), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert set(result["dictionaries"]) == {"a", "b"}
    assert result["pairs"][0]["exact"]
    assert "a  ~  b" in capsys.readouterr().out
    with pytest.raises(ValueError, match="at least two dictionaries"):
        compare_command([str(trained / "a")])
