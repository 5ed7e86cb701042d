"""The loss of a code by the Triton kernels: one pass forward, one pass backward, no product of the code's size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aen_lightning.sparse.codes import SparseCode, segment_sums
from aen_lightning.sparse.encoding import encoder_input
from aen_lightning.sparse.low_copies import low_copy
from aen_lightning.sparse.products import by_token_mm


def _table(W_dec: Tensor, low: torch.dtype) -> Tensor:
    # to make a copy costs more than it saves
    kept = low_copy(W_dec, low)
    return W_dec.detach() if kept is None else kept


class _KernelTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        l1_weights: Tensor | None,
        slopes: Tensor | None,
        code: SparseCode,
        l2_coefficient: float,
        apply_b_dec_to_input: bool,
        low: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from aen_lightning.sparse import triton_step

        batch = x.shape[0]
        order, token_offsets = code.by_token
        table = _table(W_dec, low).contiguous()
        sae_out, residual, squares = triton_step.decode(
            token_offsets, code.features[order], code.values[order], table, b_dec, x
        )
        l1_loss = l2_loss = squares.new_zeros(())
        means = None
        if l1_weights is not None:
            # Without slopes the means that the statistics took serve for the loss as well.
            means = (
                code.feature_means
                if slopes is None
                else segment_sums(code.values * slopes.to(code.values.dtype), code.feature_offsets) / batch
            )
            l1_loss = torch.dot(means, l1_weights.to(means.dtype))
        if l2_coefficient:
            l2_loss = torch.dot(code.values, code.values) * (l2_coefficient / batch)
        ctx.save_for_backward(x, W_enc, b_dec, l1_weights, slopes, residual, means, table)
        ctx.code, ctx.l2_coefficient, ctx.low = code, l2_coefficient, low
        ctx.apply_b_dec_to_input = apply_b_dec_to_input
        ctx.set_materialize_grads(False)
        return squares / batch, l1_loss, l2_loss, sae_out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_mse: Tensor | None, g_l1: Tensor | None, g_l2: Tensor | None, g_out: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        from aen_lightning.sparse import triton_step
        from aen_lightning.sparse.functions import in_layout_of

        x, W_enc, b_dec, l1_weights, slopes, residual, means, table = ctx.saved_tensors
        code, batch = ctx.code, x.shape[0]
        zero = residual.new_zeros(())
        with torch.autocast(x.device.type, enabled=False):
            g_mse_out = None if g_mse is None else residual * (g_mse * (2.0 / batch))
            grad_out = g_mse_out if g_mse_out is not None else torch.zeros_like(residual)
            if g_out is not None:
                grad_out = grad_out + g_out
            paid = g_l1 is not None and l1_weights is not None
            costs = l1_weights.to(residual.dtype) * (g_l1 / batch) if paid else zero.expand(W_enc.shape[1])
            ridge = zero if g_l2 is None else g_l2 * (2.0 * ctx.l2_coefficient / batch)
            inputs = encoder_input(x, W_enc, b_dec if ctx.apply_b_dec_to_input else None, ctx.low)
            grad_pre, grad_W_dec, by_feature, grad_b_enc = triton_step.backward(
                code.feature_offsets, code.tokens, code.values, table, grad_out.to(ctx.low).contiguous(),
                inputs.contiguous(), costs.contiguous(), slopes if paid else None, ridge,
            )  # fmt: skip
            grad_b_dec = grad_out.sum(dim=0)
            if ctx.apply_b_dec_to_input:
                # sum_b dL/dpre @ W_enc.T, with the sum taken first: one vector instead of a product over the batch.
                grad_b_dec = torch.addmv(grad_b_dec, W_enc, grad_b_enc, alpha=-1)
            grad_x = grad_weights = None
            if ctx.needs_input_grad[0]:
                grad_x = by_token_mm(code, grad_pre, W_enc.t().contiguous())
                grad_x = (grad_x if g_mse_out is None else grad_x - g_mse_out).to(x.dtype)
            if ctx.needs_input_grad[5] and g_l1 is not None:
                grad_weights = (means * g_l1).to(l1_weights.dtype)
        grads = (grad_x, in_layout_of(W_enc, by_feature), grad_b_enc, grad_W_dec, grad_b_dec, grad_weights)
        return *grads, None, None, None, None, None


def kernel_terms(
    x: Tensor,
    code: SparseCode,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_weights: Tensor | None,
    slopes: Tensor | None,
    l2_coefficient: float,
    apply_b_dec_to_input: bool,
    low: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(mse_loss, l1_loss, l2_loss, sae_out)`` of a sparse code.

    Arguments are as for :func:`~aen_lightning.sparse.loss`; ``low`` is the dtype in which the batch and its gradient
    are read, that of autocast.
    """
    return _KernelTerms.apply(
        x, W_enc, b_enc, W_dec, b_dec, l1_weights, slopes, code, l2_coefficient, apply_b_dec_to_input, low
    )
