"""The dense step: its operations counted, and its numbers under autocast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from aen_lightning import sparse
from tests.support.sparse_problem import F64, dense_terms, gradients, make_batch, make_parameters

VIEWS = {"t", "detach", "alias", "view", "expand", "unsqueeze", "transpose", "_unsafe_view"}


class Operations(TorchDispatchMode):
    """Counts what runs: all operations but views, and those that read or write a tensor of the code's size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.every, self.large = size, Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS and isinstance(out, Tensor):
            self.every[name] += 1
            if any(isinstance(t, Tensor) and t.numel() >= self.size for t in (*args, out)):
                self.large[name] += 1
        return out


def operations(step: Callable[[], Tensor], p: dict[str, nn.Parameter], size: int) -> Operations:
    with Operations(size) as counted:
        step().backward()
    for value in p.values():
        value.grad = None
    return counted


@pytest.mark.parametrize("autocast", [False, True])
def test_five_products_and_at_most_six_tenths_of_the_operations_of_autograd(autocast: bool) -> None:
    batch, d_in, d_sae = 32, 8, 128
    p, x = make_parameters(d_in, d_sae, dtype=torch.float32), make_batch(batch, d_in, dtype=torch.float32)
    weights = torch.rand(d_sae)

    def autograd() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            h = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
            sae_out = h @ p["W_dec"] + p["b_dec"]
            h.detach().mean(dim=0, dtype=torch.float32)  # what the adaptive weights are made of
            mse = torch.nn.functional.mse_loss(sae_out, x, reduction="none").sum(dim=-1).mean()
            return mse + (h * weights).sum(dim=-1).mean() + 0.1 * h.pow(2).sum(dim=-1).mean()

    def ours() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            code = sparse.encode_dense(x, p["W_enc"], p["b_enc"], p["b_dec"])
            assert code.feature_sums.dtype == torch.float32
            return sparse.loss(x, code, **p, l1_weights=weights, l2_coefficient=0.1).loss

    theirs, mine = operations(autograd, p, batch * d_sae), operations(ours, p, batch * d_sae)
    assert theirs.every["mm"] + theirs.every["addmm"] == 6
    assert mine.every["mm"] + mine.every["addmm"] == 5
    assert sum(mine.large.values()) <= 0.6 * sum(theirs.large.values())


def test_autocast_step_is_as_near_to_float64_as_autograd_under_autocast() -> None:
    p = make_parameters(48, 300, bias=-0.5, dtype=torch.float32)
    x = make_batch(200, 48, dtype=torch.float32)
    weights = torch.rand(300, generator=torch.Generator().manual_seed(3))
    exact = {name: nn.Parameter(value.detach().double()) for name, value in p.items()}
    terms = dense_terms(x.double(), exact, weights.double(), 0.1)
    expected = gradients(sum(terms[:3]), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        naive = dense_terms(x, p, weights, 0.1)
        code = sparse.encode_dense(x, p["W_enc"], p["b_enc"], p["b_dec"])
        out = sparse.loss(x, code, **p, l1_weights=weights, l2_coefficient=0.1)
    assert code.values.dtype == torch.bfloat16
    assert out.loss.dtype == out.sae_out.dtype == torch.float32
    naive_grads = gradients(sum(naive[:3]), p)
    for name, grad in gradients(out.loss, p).items():
        assert grad.dtype == torch.float32
        error, naive_error = ((g.double() - expected[name]).norm() for g in (grad, naive_grads[name]))
        assert error <= 1.25 * naive_error, name
        assert error <= 0.05 * expected[name].norm(), name
    for actual, want in zip(out[:3], terms[:3], strict=True):
        assert_close(actual.double(), want, rtol=5e-3, atol=0)


def test_a_code_made_elsewhere_serves_as_well() -> None:
    p, x = make_parameters(6, 20), make_batch(9, 6)
    h = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).detach()
    expected = gradients(dense_terms(x, p, torch.ones(20, dtype=F64), 0.2)[0], p)
    out = sparse.loss(x, sparse.DenseCode(h), **p)
    for name, grad in gradients(out.loss, p).items():
        assert_close(grad, expected[name], rtol=1e-10, atol=1e-10)
