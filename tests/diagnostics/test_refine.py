"""Proximal steps on the encoder's codes, against hand-worked numbers and the exact solution."""

from __future__ import annotations

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from torch.nn.functional import normalize
from torch.testing import assert_close

from aen_lightning.diagnostics import (
    CodingProblem,
    coding_gap,
    coding_objective,
    coding_problem,
    solve_coding,
)
from aen_lightning.diagnostics.coding import proximal_steps

F64 = torch.float64


def test_the_problem_has_the_coefficient_that_was_reached():
    sae = StandardSAE(StandardSAEConfig(d_in=4, d_sae=8))
    sae.cfg.metadata.training_architecture = "aen"
    sae.cfg.metadata.training_architecture_details = {"l1_coefficient": 0.3, "l2_coefficient": 0.1}
    assert_close(coding_problem(sae).l1, torch.full((8,), 0.3, dtype=F64))
    sae.cfg.metadata["reached_l1_coefficient"] = 0.75
    assert_close(coding_problem(sae).l1, torch.full((8,), 0.75, dtype=F64))


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_the_objective_never_rises_and_ends_at_the_exact_optimum(l2: float):
    g = torch.Generator().manual_seed(0)
    W = normalize(torch.randn(24, 12, dtype=F64, generator=g), dim=-1)
    y = 2 * torch.randn(20, 12, dtype=F64, generator=g)
    c = 0.1 + torch.rand(24, dtype=F64, generator=g)
    h = (y @ W.T - 0.3).relu()
    objective = coding_objective(y, W, h, l1=c, l2=l2)
    exact = solve_coding(y, W, l1=c, l2=l2)
    for _ in range(60):
        h = proximal_steps(y, W, h, l1=c, l2=l2, n_steps=1)
        now = coding_objective(y, W, h, l1=c, l2=l2)
        assert (now <= objective + 1e-12).all()
        assert (now >= exact.objective - 1e-9).all()
        objective = now
    h = proximal_steps(y, W, h, l1=c, l2=l2, n_steps=20_000)
    assert_close(coding_objective(y, W, h, l1=c, l2=l2), exact.objective, rtol=1e-7, atol=0)


def test_one_step_on_an_orthonormal_dictionary_is_the_soft_threshold():
    y = torch.tensor([[2.0, 0.2, -1.0]], dtype=F64)
    h = proximal_steps(
        y,
        torch.eye(3, dtype=F64),
        torch.zeros(1, 3, dtype=F64),
        l1=torch.full((3,), 1.0, dtype=F64),
        l2=0.5,
        n_steps=1,
    )
    # (2 y - l1)_+ / (2 (1 + l2))
    assert_close(h, torch.tensor([[1.0, 0.0, 0.0]], dtype=F64))


def test_the_section_reports_the_refined_code_between_encoder_and_optimum():
    g = torch.Generator().manual_seed(1)
    W = normalize(torch.randn(24, 12, dtype=F64, generator=g), dim=-1)
    y = 2 * torch.randn(50, 12, dtype=F64, generator=g)
    problem = CodingProblem(torch.full((24,), 0.4, dtype=F64), 0.1, 1.0, "given")
    h, zero = (y @ W.T - 0.3).relu(), torch.zeros(12, dtype=F64)
    section, _ = coding_gap(y, h, W, zero, problem, n_refine=5)
    found, means = section["refined"], section["objective"]
    assert found["n_steps"] == 5
    assert means["exact"] < found["objective"] < means["encoder"]
    assert "refined" not in coding_gap(y, h, W, zero, problem)[0]
