"""RowAdam against torch's Adam in float64, with rows that fall silent and wake."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from aen_lightning import sparse
from aen_lightning.sparse.low_copies import low_copy

ROWS, WIDTH = 12, 5


def gradient(step: int, dtype: torch.dtype) -> Tensor:
    """Row r fires once in about 4^r / 40 steps: the first at every step, the last ones hardly ever; one never."""
    generator = torch.Generator().manual_seed(step)
    g = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    rates = (40.0 / 4.0 ** torch.arange(ROWS)).clamp_max(1.0).double()
    fires = torch.rand(ROWS, generator=generator, dtype=torch.float64) < rates
    fires[-1], fires[5] = False, step % 700 == 5
    return (g * fires[:, None]).to(dtype)


def start(dtype: torch.dtype, *, transposed: bool) -> nn.Parameter:
    p = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    p = p / p.norm(dim=1, keepdim=True)
    return nn.Parameter(p.to(dtype).t() if transposed else p.to(dtype))


def run(
    make: Any, dtype: torch.dtype, steps: range, *, transposed: bool = False, project: bool = False,
    max_norm: float | None = None, p: nn.Parameter | None = None, optimizer: Any = None,
) -> tuple[nn.Parameter, Any]:  # fmt: skip
    p = start(dtype, transposed=transposed) if p is None else p
    optimizer = make([p]) if optimizer is None else optimizer
    rows = isinstance(optimizer, sparse.RowAdam)
    if rows and project:
        optimizer.hold_rows(p, lambda: torch.ones(ROWS, dtype=dtype))
    for step in steps:
        g = gradient(step, dtype)
        p.grad = g.t() if transposed else g
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + step % 7)
        if rows:
            optimizer.param_groups[0]["max_norm"] = max_norm
        elif max_norm:
            nn.utils.clip_grad_norm_([p], max_norm)
        optimizer.step()
        if project and not rows:
            with torch.no_grad():
                p.div_(p.norm(dim=1, keepdim=True))
    return p, optimizer


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thousands_of_steps_end_where_torchs_adam_ends(dtype: torch.dtype, project: bool) -> None:
    n = 2000
    ours, optimizer = run(sparse.RowAdam, dtype, range(n), project=project, max_norm=2.0)
    exact, theirs = run(torch.optim.Adam, torch.float64, range(n), project=project, max_norm=2.0)
    silent = optimizer.state[ours]["silent_steps"]
    assert (silent > 256).sum() >= 4  # rows are at rest, and others have woken
    tolerance = 1e-10
    if dtype == torch.float32:  # as far from the truth as torch's own float32 is, at most twice
        rounded, _ = run(torch.optim.Adam, dtype, range(n), project=project, max_norm=2.0)
        tolerance = 2 * float((rounded.double() - exact).abs().max())
    assert_close(ours.double(), exact, rtol=0, atol=tolerance)
    state = optimizer.state_dict()["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        assert_close(state[name].double(), theirs.state[exact][name], rtol=1e-4, atol=1e-9)
    assert state["step"] == theirs.state[exact]["step"] == n


def test_a_row_that_rests_is_not_touched_and_wakes_as_torchs_would() -> None:
    ours, optimizer = run(sparse.RowAdam, torch.float64, range(700))
    assert optimizer.state[ours]["silent_steps"][5] == 694
    before = ours.detach().clone(), optimizer.state[ours]["exp_avg"].clone()
    run(sparse.RowAdam, torch.float64, range(700, 705), p=ours, optimizer=optimizer)
    assert torch.equal(ours[5], before[0][5])
    assert torch.equal(optimizer.state[ours]["exp_avg"][5], before[1][5])
    run(sparse.RowAdam, torch.float64, range(705, 706), p=ours, optimizer=optimizer)
    exact, _ = run(torch.optim.Adam, torch.float64, range(706))
    assert not torch.equal(ours[5], before[0][5])
    assert_close(ours[5], exact[5], rtol=0, atol=1e-11)


@pytest.mark.parametrize("to", ["ours", "torch"])
@pytest.mark.parametrize("begun_by", ["ours", "torch"])
def test_saved_and_loaded_it_goes_on(begun_by: str, to: str) -> None:
    makers = {"ours": sparse.RowAdam, "torch": torch.optim.Adam}
    p, first = run(makers[begun_by], torch.float64, range(900))
    saved = copy.deepcopy(first.state_dict())
    q = nn.Parameter(p.detach().clone())
    second = makers[to]([q])
    second.load_state_dict(saved)
    q, _ = run(makers[to], torch.float64, range(900, 1500), p=q, optimizer=second)
    exact, _ = run(torch.optim.Adam, torch.float64, range(1500))
    assert_close(q, exact, rtol=0, atol=1e-10)
    p, _ = run(makers[begun_by], torch.float64, range(900, 1500), p=p, optimizer=first)
    assert_close(p, exact, rtol=0, atol=1e-10)  # saving changed nothing


def test_a_matrix_stored_transposed_and_a_vector() -> None:
    ours, optimizer = run(sparse.RowAdam, torch.float64, range(400), transposed=True)
    exact, _ = run(torch.optim.Adam, torch.float64, range(400))
    assert optimizer.state[ours]["silent_steps"].shape == (ROWS,)
    assert_close(ours.t(), exact, rtol=0, atol=1e-11)
    vectors = [nn.Parameter(torch.ones(37, dtype=torch.float64)) for _ in range(2)]
    for vector, make in zip(vectors, (sparse.RowAdam, torch.optim.Adam), strict=True):
        stepping = make([vector])
        for step in range(20):
            vector.grad = torch.linspace(-1, 1, 37, dtype=torch.float64) * (step % 3)
            stepping.step()
    assert_close(vectors[0], vectors[1], rtol=0, atol=1e-12)


def test_the_low_copy_is_kept_until_the_parameter_changes_otherwise() -> None:
    p, optimizer = run(lambda ps: sparse.RowAdam(ps, low_dtype=torch.bfloat16), torch.float32, range(3))
    kept = low_copy(p, torch.bfloat16)
    assert kept is not None
    assert torch.equal(kept, p.to(torch.bfloat16))
    assert low_copy(p, torch.float32) is not None  # itself
    with torch.no_grad():
        p.mul_(2)
    assert low_copy(p, torch.bfloat16) is None
    run(None, torch.float32, range(3, 4), p=p, optimizer=optimizer)
    kept = low_copy(p, torch.bfloat16)
    assert kept is not None
    assert torch.equal(kept, p.to(torch.bfloat16))


def test_options_it_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"RowAdam takes lr, betas and eps, got weight_decay=0\.1"):
        sparse.RowAdam([nn.Parameter(torch.ones(2))], weight_decay=0.1)
