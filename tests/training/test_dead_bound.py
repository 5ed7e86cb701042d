"""The bound on dead features that no step waits for."""

from __future__ import annotations

import copy

import pytest
import torch

from aen_lightning.training.dead_bound import DeadBound

D_SAE = 3000


def silences(n_steps: int) -> list[torch.Tensor]:
    """Steps without firing, of features that are silent from step 7 on, or 60 on, or fire at random."""
    generator = torch.Generator().manual_seed(0)
    since, all_steps = torch.zeros(D_SAE, dtype=torch.int64), []
    for step in range(n_steps):
        fires = torch.rand(D_SAE, generator=generator) < 0.05
        fires[:900] &= step < 7
        fires[900:2000] &= step < 60
        since = (since + 1).masked_fill(fires, 0)
        all_steps.append(since)
    return all_steps


@pytest.mark.parametrize("window", [3, 40])
def test_no_step_has_more_dead_features_than_the_bound(window: int) -> None:
    bound, bounds = DeadBound(), []
    for since in silences(150):
        bounds.append(bound.next_step(since, window))
        assert int((since > window).sum()) <= bounds[-1] <= D_SAE
    if window == 40:
        assert bounds[0] == 0
        assert 900 < bounds[55] < 2000, "a bound that says something"


def test_resumed_it_says_what_it_would_have_said() -> None:
    whole, first, steps = DeadBound(), DeadBound(), silences(40)
    expected = [whole.next_step(since, 15) for since in steps]
    for since in steps[:17]:
        first.next_step(since, 15)
    resumed = DeadBound()
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [resumed.next_step(since, 15) for since in steps[17:]] == expected[17:]
