"""Thresholds of a JumpReLU finish: a level that holds the mean L0, and a trained offset of each feature."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import JumpReLU
from torch import Tensor
from typing_extensions import override

from aen_lightning.sparse import SparseCode, per_entry

_BANDWIDTH = 0.5
_ROOM = 2 / 3  # of the last level, that the next one may fall to


def keep_above(
    hidden_pre: Tensor, offsets: Tensor, *, n_kept: int, bandwidth: float = _BANDWIDTH
) -> tuple[Tensor, Tensor]:
    """JumpReLU activations with thresholds ``level + offsets``, where the level is such that ``n_kept`` are kept.

    The offsets get the gradient of SAELens's JumpReLU, a straight-through estimate, along which the number of activations
    kept does not change: raising one threshold lowers the level for all. So no coefficient weighs sparsity against error.
    Only positive pre-activations count, for the level and for the gradient.

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
    flat = flat.masked_fill(flat <= 0, torch.finfo(flat.dtype).min)  # far from every threshold
    with torch.no_grad():
        scores = (flat - offsets).where(flat > 0, -torch.inf).flatten()
        level, width = _level(scores, n_kept, bandwidth)
        near = ((flat - (level + offsets).clamp_min(0)).abs() < width / 2).sum(dim=0)
    kept = JumpReLU.apply(flat, _Thresholds.apply(offsets, level, near), width, False)
    return kept.reshape(hidden_pre.shape), level


def keep_entries_above(
    code: SparseCode, values: Tensor, offsets: Tensor, *, n_kept: int, bandwidth: float = _BANDWIDTH
) -> tuple[Tensor, Tensor]:
    """As :func:`keep_above`, on the entries of a code.

    The code must hold what counts: every positive pre-activation above ``level * (1 - bandwidth / 2) + offset``. With all
    positive ones it does; with fewer, look at the level.

    Args:
        code: Positive pre-activations.
        values: (nnz,) its values, with a gradient (:func:`aen_lightning.sparse.activations`).
        offsets: (d_sae,).
        n_kept: See :func:`keep_above`.
        bandwidth: Likewise.

    Returns:
        The activations (nnz,), 0 where an entry is not kept, and the level, a scalar.
    """
    with torch.no_grad():
        own = offsets[code.features]
        level, width = _level(code.values - own, n_kept, bandwidth)
        is_near = (code.values - (level + own).clamp_min(0)).abs() < width / 2
        near = torch.bincount(code.features[is_near], minlength=len(offsets))
    thresholds = per_entry(_Thresholds.apply(offsets, level, near), code)
    # SAELens's function sums the gradient of thresholds over rows: one row
    return JumpReLU.apply(values.unsqueeze(0), thresholds, width, False).squeeze(0), level


def floor_of(level: Tensor, offsets: Tensor) -> Tensor:
    """(d_sae,): a code of what exceeds this holds what counts if the next level is two thirds of ``level`` or more.

    See :func:`keep_entries_above`, with its own bandwidth.
    """
    return (level * (1 - _BANDWIDTH / 2) * _ROOM + offsets.detach()).clamp_min(0)


def floor_suffices(floor_level: Tensor, level: Tensor, n_entries: int, n_kept: int) -> bool:
    """Whether a code above :func:`floor_of` ``floor_level`` with ``n_entries`` held what counts, now that the level is known."""
    return n_entries > n_kept and bool(level >= floor_level * _ROOM)


def _level(scores: Tensor, n_kept: int, bandwidth: float) -> tuple[Tensor, Tensor]:
    """The level that keeps ``n_kept`` of the scores (n,), -inf where there is no activation; the window's width there."""
    level = scores.new_zeros(())
    if len(scores) > n_kept:
        # between the last activation kept and the first one left out
        ends = scores.topk(n_kept + 1, sorted=True).values[-2:]
        level = torch.where(ends.isfinite().all(), ends.mean(), level)
    return level, bandwidth * level.abs().clamp_min(torch.finfo(scores.dtype).tiny)


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
