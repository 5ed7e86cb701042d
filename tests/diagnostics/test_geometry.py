"""Lipschitz constants, coherence and Gram spectra, by hand and by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

from aen_lightning.diagnostics import (
    CodingProblem,
    active_gram,
    coding_bound,
    coding_map_lipschitz,
    coherence,
    encoder_lipschitz,
    solve_coding,
)
from aen_lightning.diagnostics.coding import spectral_norm
from tests.support.dictionaries import F64, generator, relu_dictionary


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
