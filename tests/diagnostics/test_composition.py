"""Composing features: what is lost, and what fires that should not."""

from __future__ import annotations

import pytest
import torch

from aen_lightning.diagnostics import (
    composition,
)
from tests.support.dictionaries import orthonormal, relu_dictionary


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
