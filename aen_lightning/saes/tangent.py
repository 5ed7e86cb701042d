"""The decoder's gradient along the sphere that its rows are held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _WithoutRadialGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(W_dec)
        return W_dec.view_as(W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (W_dec,), (grad,) = ctx.saved_tensors, grads
        unit = torch.nn.functional.normalize(W_dec.to(grad.dtype), dim=-1)
        return grad - (grad * unit).sum(dim=-1, keepdim=True) * unit


def without_radial_gradient(W_dec: Tensor) -> Tensor:
    """``W_dec`` itself, whose gradient has no part along its rows: ``grad -= (grad . d) d`` for each unit row
    d.

    Rows are projected to the sphere after each step anyway, but Adam's moments would remember the radial
    part. It is linear in the gradient, so accumulation and averaging over ranks stay exact. Source: common
    among SAE trainers; not in the paper.

    Args:
        W_dec: Shape (d_sae, d_in); rows of any norm but zero.
    """
    out: Tensor = _WithoutRadialGradient.apply(W_dec)
    return out
