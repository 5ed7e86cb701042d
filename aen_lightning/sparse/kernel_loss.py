"""The loss of a code by the Triton kernels: one pass forward, one pass backward, no product of the code's size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aen_lightning.sparse.codes import SparseCode, segment_sums
from aen_lightning.sparse.low_copies import low_copy
from aen_lightning.sparse.products import by_token_mm
from aen_lightning.sparse.terms import Settings, input_gradient, output_gradients


def _table(W_dec: Tensor, low: torch.dtype) -> Tensor:
    # to make a copy costs more than it saves
    kept = low_copy(W_dec, low)
    return W_dec.detach() if kept is None else kept


class _KernelTerms(torch.autograd.Function):
    """``(mse_loss, l1_loss, l2_loss, sae_out)`` of a sparse code."""

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
        settings: Settings[SparseCode],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from aen_lightning.sparse import triton_step

        code, batch, l2_coefficient = settings.code, x.shape[0], settings.l2_coefficient
        order, token_offsets = code.by_token
        table = _table(W_dec, settings.low).contiguous()
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
        ctx.settings = settings
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
        settings: Settings[SparseCode] = ctx.settings
        code, batch = settings.code, x.shape[0]
        zero = residual.new_zeros(())
        with torch.autocast(x.device.type, enabled=False):
            by_mse, grad_out = output_gradients(residual, g_mse, g_out)
            paid = g_l1 is not None and l1_weights is not None
            costs = l1_weights.to(residual.dtype) * (g_l1 / batch) if paid else zero.expand(W_enc.shape[1])
            ridge = zero if g_l2 is None else g_l2 * (2.0 * settings.l2_coefficient / batch)
            inputs = settings.encoder_input(x, W_enc, b_dec)
            grad_pre, grad_W_dec, by_feature, grad_b_enc = triton_step.backward(
                code.feature_offsets, code.tokens, code.values, table, grad_out.to(settings.low).contiguous(),
                inputs.contiguous(), costs.contiguous(), slopes if paid else None, ridge,
            )  # fmt: skip
            grad_b_dec = settings.grad_b_dec(grad_out, W_enc, grad_b_enc)
            grad_x = grad_weights = None
            if ctx.needs_input_grad[0]:
                grad_x = input_gradient(by_token_mm(code, grad_pre, W_enc.t().contiguous()), by_mse, x)
            if ctx.needs_input_grad[5] and g_l1 is not None:
                grad_weights = (means * g_l1).to(l1_weights.dtype)
        grads = (grad_x, in_layout_of(W_enc, by_feature), grad_b_enc, grad_W_dec, grad_b_dec, grad_weights)
        return *grads, None, None


def kernel_terms(
    x: Tensor, parameters: tuple[Tensor, ...], l1_weights: Tensor | None, slopes: Tensor | None,
    settings: Settings[SparseCode],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(mse_loss, l1_loss, l2_loss, sae_out)``; ``parameters`` are ``W_enc, b_enc, W_dec, b_dec``."""
    return _KernelTerms.apply(x, *parameters, l1_weights, slopes, settings)
