"""The differentiable steps that an objective on the non-zeros is made of.

Each takes and gives plain tensors, with one number per entry of a code, in the code's order, for what is sparse.
Between them an objective may do whatever PyTorch can do with such a vector; autograd joins the parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aen_lightning.sparse.codes import SparseCode, segment_sums
from aen_lightning.sparse.encoding import encoder_input
from aen_lightning.sparse.products import at_entries, by_feature_mm, by_token_mm

_TRANSPOSE_BLOCK = 512


def in_layout_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """``gradient`` (d_sae, d_in) as (d_in, d_sae) in the parameter's memory layout; no copy if feature-major."""
    if not parameter.is_contiguous():
        return gradient.t()
    out = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    for j in range(0, gradient.shape[0], _TRANSPOSE_BLOCK):  # in blocks that fit the cache
        out[:, j : j + _TRANSPOSE_BLOCK] = gradient[j : j + _TRANSPOSE_BLOCK].t()
    return out


class _Activations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor | None,
        b_dec: Tensor | None,
        code: SparseCode,
        values: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec)
        ctx.code = code
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec = ctx.saved_tensors
        code = ctx.code
        with torch.autocast(x.device.type, enabled=False):
            grad_W_enc = in_layout_of(W_enc, by_feature_mm(code, grad, encoder_input(x, W_enc, b_dec)))
            grad_b_enc = segment_sums(grad, code.feature_offsets)
            # sum_b dL/dpre @ W_enc.T, with the sum taken first: one vector instead of a product over the batch.
            grad_b_dec = None if b_dec is None else -(W_enc @ grad_b_enc)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = by_token_mm(code, grad, W_enc.t().contiguous()).to(x.dtype)
        return grad_x, grad_W_enc, grad_b_enc if ctx.needs_input_grad[2] else None, grad_b_dec, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor, code: SparseCode) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.code = code
        return by_token_mm(code, values, W_dec).add_(b_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        need_values, need_W_dec, need_b_dec, _ = ctx.needs_input_grad
        with torch.autocast(grad.device.type, enabled=False):
            return (
                at_entries(ctx.code, W_dec, grad) if need_values else None,
                by_feature_mm(ctx.code, values, grad) if need_W_dec else None,
                grad.sum(dim=0) if need_b_dec else None,
                None,
            )


class _PerEntry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, per_feature: Tensor, code: SparseCode) -> Tensor:
        ctx.code = code
        return per_feature.index_select(0, code.features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return segment_sums(grad, ctx.code.feature_offsets), None


def activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, code: SparseCode) -> Tensor:
    """The code's values, differentiable with respect to what they were computed from.

    An entry has the derivative of its pre-activation, ``(x - b_dec) @ W_enc + b_enc``; where the code has no entry
    the derivative is zero. ``code`` must have been made from the same, unchanged tensors.

    Returns:
        (nnz,).
    """
    return _Activations.apply(x, W_enc, b_enc, b_dec, code, code.values)


def projections(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, code: SparseCode) -> Tensor:
    """``(x - b_dec) @ W_enc`` at the code's entries: as :func:`activations`, less the bias; (nnz,)."""
    values = code.values - b_enc.detach().index_select(0, code.features)
    return _Activations.apply(x, W_enc, None, b_dec, code, values)


def decode(values: Tensor, W_dec: Tensor, b_dec: Tensor, code: SparseCode) -> Tensor:
    """``h @ W_dec + b_dec`` for the h that has ``values`` (nnz,) at the code's entries; (batch, d_in)."""
    return _Decode.apply(values, W_dec, b_dec, code)


def per_entry(per_feature: Tensor, code: SparseCode) -> Tensor:
    """(nnz,): of (d_sae,) numbers that of each entry's feature. The gradient is summed without atomic additions."""
    return _PerEntry.apply(per_feature, code)
