"""Adam on transposed parameters against torch.optim.Adam."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from aen_lightning import sparse
from tests.support.sparse_problem import NAMES, encode, make_batch, make_parameters


@pytest.mark.parametrize("kwargs", [{}, {"amsgrad": True}, {"weight_decay": 0.1}])
def test_fused_adam_equals_adam_in_either_layout(kwargs: dict[str, Any]) -> None:
    reference = make_parameters(6, 20)
    ours = copy.deepcopy(reference)
    sparse.feature_major_(ours["W_enc"])
    x = make_batch(10, 6)
    optimizers = [
        torch.optim.Adam(reference.values(), lr=1e-2, foreach=False, **kwargs),
        sparse.FusedAdam(ours.values(), lr=1e-2, **kwargs),
    ]
    for _ in range(5):
        for p, optimizer in zip((reference, ours), optimizers, strict=True):
            optimizer.zero_grad()
            sparse.loss(x, encode(x, p), **p).loss.backward()
            optimizer.step()
    for name in NAMES:
        assert_close(ours[name], reference[name], rtol=1e-9, atol=1e-9)
    assert ours["W_enc"].stride() == (1, 6)
    fresh = sparse.FusedAdam(ours.values(), lr=1e-2, **kwargs)
    fresh.load_state_dict(optimizers[1].state_dict())
    assert_close(fresh.state[ours["W_enc"]]["exp_avg"], optimizers[0].state[reference["W_enc"]]["exp_avg"])


@pytest.mark.parametrize("max_norm", [0.3, 1e9])
def test_clipping_in_the_kernel_is_clip_grad_norm_group_by_group(max_norm: float) -> None:
    reference = [make_parameters(6, 20, dtype=torch.float32, seed=seed) for seed in (0, 1)]
    ours = copy.deepcopy(reference)
    for p in ours:
        sparse.feature_major_(p["W_enc"])
    optimizers = [
        torch.optim.Adam([{"params": list(p.values())} for p in reference], lr=1e-2),
        sparse.FusedAdam([{"params": list(p.values())} for p in ours], lr=1e-2),
    ]
    for group in optimizers[1].param_groups:
        group["max_norm"] = max_norm
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        for p, own in zip(reference, ours, strict=True):
            for name in NAMES:
                p[name].grad = torch.randn(p[name].shape, generator=generator) * (step + 1)
                own[name].grad = torch.empty_like(own[name]).copy_(p[name].grad)
            torch.nn.utils.clip_grad_norm_(p.values(), max_norm)
        for optimizer in optimizers:
            optimizer.step()
    for p, own in zip(reference, ours, strict=True):
        for name in NAMES:
            assert_close(own[name], p[name], rtol=1e-5, atol=1e-6)
            assert_close(own[name].grad, p[name].grad)


def test_a_copy_of_the_optimizer_still_takes_transposed_views() -> None:
    seen = []
    p = make_parameters(6, 20)
    sparse.feature_major_(p["W_enc"])
    optimizer = copy.deepcopy(sparse.FusedAdam([p["W_enc"]], lr=1e-2))
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.ones_like(param)
    before = param.detach().clone()
    optimizer.register_step_post_hook(lambda *_: seen.append(param.stride()))
    optimizer.step()
    assert seen == [(1, 6)]
    assert "_init_group" in vars(optimizer), "hooked anew"
    assert_close(param, before - 1e-2)


def test_fused_adam_is_fused() -> None:
    with pytest.raises(ValueError, match="FusedAdam is fused by definition"):
        sparse.FusedAdam(make_parameters(6, 20).values(), fused=False)
