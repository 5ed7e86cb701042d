"""Thresholds of a JumpReLU finish: a level that holds the mean L0, and a trained offset of each feature."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import JumpReLU
from torch import Tensor
from typing_extensions import override


def keep_above(
    hidden_pre: Tensor, offsets: Tensor, *, n_kept: int, bandwidth: float = 0.5
) -> tuple[Tensor, Tensor]:
    """JumpReLU activations with thresholds ``level + offsets``, where the level is such that ``n_kept`` are kept.

    The offsets get the gradient of SAELens's JumpReLU, a straight-through estimate, along which the number of activations
    kept does not change: raising one threshold lowers the level for all. So no coefficient weighs sparsity against error.

    Args:
        hidden_pre: (..., d_sae) pre-activations.
        offsets: (d_sae,), in units of the activations.
        n_kept: Activations to keep in all, a count above 0; fewer where fewer are positive.
        bandwidth: Width of the window around a threshold in which activations count for its gradient, as a share of
            the level, above 0.

    Returns:
        The activations (..., d_sae), and the level, a scalar.
    """
    flat = hidden_pre.reshape(-1, hidden_pre.shape[-1])
    with torch.no_grad():
        scores = torch.where(flat > 0, flat - offsets, -torch.inf).flatten()
        # between the last activation kept and the first one left out
        ends = scores.topk(min(n_kept + 1, scores.numel()), sorted=True).values[-2:]
        level = torch.where(ends.isfinite().all(), ends.mean(), 0.0)
        width = bandwidth * level.abs().clamp_min(torch.finfo(flat.dtype).tiny)
        near = ((flat - (level + offsets).clamp_min(0)).abs() < width / 2).sum(dim=0)
    thresholds = _Thresholds.apply(offsets, level, near)
    kept = JumpReLU.apply(flat, thresholds, width, False)
    return kept.reshape(hidden_pre.shape), level


class _Thresholds(torch.autograd.Function):
    """``level + offsets``, with the level's own dependence on the offsets in the gradient.

    The level keeps the number of activations: ``sum_i near_i (d level + d offset_i) = 0``, where ``near_i`` is the density
    of feature i's activations at its threshold, estimated on the same window as the gradient.
    """

    @override
    @staticmethod
    def forward(ctx: Any, offsets: Tensor, level: Tensor, near: Tensor) -> Tensor:
        ctx.save_for_backward(near)
        return (level + offsets).clamp_min(0)

    @override
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (near,) = ctx.saved_tensors
        share = near.to(grads[0].dtype) / near.sum().clamp_min(1)
        return grads[0] - share * grads[0].sum(), None, None
