"""Which features two dictionaries share."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from aen_lightning.diagnostics import (
    compare_dictionaries,
    composition,
)
from aen_lightning.diagnostics.stability import shared_subspace
from aen_lightning.metrics import match_features
from tests.support.dictionaries import F64, generator, orthonormal, relu_dictionary


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
