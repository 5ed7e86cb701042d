"""Gradient clipping where each rank holds a part of the gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_gradients_(
    parameters: Iterable[nn.Parameter], clip_val: float, *, algorithm: str | None = "norm"
) -> None:
    """Clip as ``torch.nn.utils.clip_grad_norm_`` does on one rank (or ``clip_grad_value_``).

    Args:
        parameters: DTensors on one mesh: sharded, or the same on every rank.
        clip_val: Largest norm of all gradients together, or largest absolute value.
        algorithm: Lightning's ``norm`` (None: too) or ``value``.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    local = [_local(g) for g in gradients]
    if algorithm == "value":
        for part in local:
            part.clamp_(-clip_val, clip_val)
        return
    # one sum for what is sharded, one for what each rank has whole
    sums = torch.zeros(2, dtype=torch.promote_types(local[0].dtype, torch.float32), device=local[0].device)
    for gradient, part in zip(gradients, local, strict=True):
        sums[int(_is_replicated(gradient))] += torch.linalg.vector_norm(part, dtype=sums.dtype).square()
    sharded, whole = sums.unbind()
    sharded = sharded.clone()
    mesh = next(g.device_mesh for g in gradients if isinstance(g, DTensor))
    dist.all_reduce(sharded, group=mesh.get_group())
    coefficient = (clip_val / ((sharded + whole).sqrt() + 1e-6)).clamp(max=1.0)
    for part in local:
        part.mul_(coefficient.to(part.dtype))


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _is_replicated(gradient: Tensor) -> bool:
    return not isinstance(gradient, DTensor) or all(p.is_replicate() for p in gradient.placements)
