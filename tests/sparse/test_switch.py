"""When the step turns sparse, and when it turns back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aen_lightning import sparse
from tests.support.sparse_problem import F64, make_batch, make_parameters


def test_training_through_the_switch_follows_the_dense_path() -> None:
    runs = []
    for switching in (True, False):
        p = make_parameters(8, 64, bias=0.0)
        optimizer = sparse.FusedAdam(p.values(), lr=3e-2)
        switch, losses, paths = sparse.DensitySwitch(threshold=0.3, every_n_steps=2), [], []
        for step in range(60):
            x = make_batch(32, 8, seed=step)
            make = sparse.encode if switching and switch.sparse else sparse.encode_dense
            code = make(x, p["W_enc"], p["b_enc"], p["b_dec"])
            switch.observe(code)
            paths.append(isinstance(code, sparse.SparseCode))
            loss = sparse.loss(x, code, l1_weights=torch.full((64,), 3.0, dtype=F64), **p).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append((losses, paths))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-9)
    assert not runs[0][1][0]
    assert runs[0][1][-1]  # it did switch


def code_of_density(active: int, total: int = 100, *, dense: bool) -> Any:
    values = torch.zeros(10, total // 10)
    values.view(-1)[:active] = 1.0
    if dense:
        return sparse.DenseCode(values)
    x = torch.eye(10)
    code = sparse.encode(x, values - 0.5, torch.zeros(total // 10))
    assert code.nnz == active
    return code


def test_density_switch_counts_dense_codes_every_n_steps_only() -> None:
    switch = sparse.DensitySwitch(threshold=0.1, hysteresis=2.0, every_n_steps=3)
    assert not switch.sparse
    switch.observe(code_of_density(50, dense=True))
    assert not switch.sparse
    for expected in (False, False, True):  # steps 2 and 3 are not counted, step 4 is
        switch.observe(code_of_density(10, dense=True))
        assert switch.sparse is expected
    switch.observe(code_of_density(20, dense=False))  # inside the hysteresis
    assert switch.sparse
    switch.observe(code_of_density(21, dense=False))
    assert not switch.sparse
    switch.observe(code_of_density(5, dense=True))  # back on the dense path: counted at once
    assert switch.sparse
    assert switch.screen is False  # the last sparse code was too dense to screen
    switch.observe(code_of_density(1, dense=False))
    assert switch.screen is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"threshold": 0.0}, r"threshold must be a share of non-zeros in \(0, 1\), got 0.0"),
        ({"hysteresis": 0.5}, "hysteresis must be at least 1, got 0.5"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
    ],
)
def test_density_switch_refuses_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse.DensitySwitch(**kwargs)
