"""The step of a code too dense to gain from sparsity: five products, and no tensor of the code's size for the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aen_lightning.sparse.codes import DenseCode
from aen_lightning.sparse.encoding import check_shapes, encoder_input, product_dtype
from aen_lightning.sparse.low_copies import low_copy
from aen_lightning.sparse.terms import Settings, input_gradient, output_gradients


@torch.compiler.disable
@torch.no_grad()
def encode_dense(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None = None) -> DenseCode:
    """The code of :func:`~aen_lightning.sparse.encode` as one dense tensor, for batches in which many features fire.

    Under autocast the product, the bias and the code have autocast's dtype: half of what is read and written.

    Args:
        x: (batch, d_in) activations.
        W_enc: (d_in, d_sae), float32 or float64.
        b_enc: (d_sae,).
        b_dec: (d_in,), subtracted from ``x`` first, or None.
    Raises:
        ValueError: If shapes disagree.
        TypeError: If the parameters are neither float32 nor float64.
    """
    check_shapes(x, W_enc, b_enc, b_dec)
    dtype = product_dtype(W_enc)
    with torch.autocast(x.device.type, enabled=False):
        inputs = encoder_input(x, W_enc, b_dec, dtype)
        kept = low_copy(W_enc, dtype)
        weight = W_enc.detach().to(dtype) if kept is None else kept
        pre = torch.addmm(b_enc.detach().to(dtype), inputs, weight)
        return DenseCode(pre.relu_(), inputs)


def _squared_norm(tensor: Tensor) -> Tensor:
    if tensor.dtype in (torch.float32, torch.float64):
        flat = tensor.reshape(-1)
        return torch.dot(flat, flat)  # no squared copy
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).square()


def _product_in(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """``a * b``, rounded once to ``dtype``, in one pass on a GPU."""
    if a.dtype == dtype:
        return a * b
    return torch.mul(a, b, out=torch.empty_like(a, dtype=dtype))


class _DenseTerms(torch.autograd.Function):
    """``(mse_loss, l1_loss, l2_loss, sae_out)`` of a dense code.

    Forward from a code, backward to the parameters that made it (the code itself carries no graph).
    """

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
        settings: Settings[DenseCode],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, code, l2_coefficient = x.shape[0], settings.code, settings.l2_coefficient
        h = code.values
        kept = low_copy(W_dec, h.dtype)
        low_W_dec = W_dec.to(h.dtype) if kept is None else kept
        # In half precision the sum with the bias promotes.
        full = h.dtype == W_dec.dtype
        sae_out = torch.addmm(b_dec, h, W_dec) if full else torch.mm(h, low_W_dec) + b_dec
        residual = sae_out - x.to(sae_out.dtype)
        mse_loss = _squared_norm(residual) / batch
        means = None
        if l1_weights is None:
            l1_loss = mse_loss.new_zeros(())
        else:
            # Without slopes the means that the statistics took serve for the loss as well.
            means = (
                code.feature_means
                if slopes is None
                else (h * slopes).sum(dim=0, dtype=mse_loss.dtype) / batch
            )
            l1_loss = torch.dot(means.to(mse_loss.dtype), l1_weights.to(mse_loss.dtype))
        if l2_coefficient:
            l2_loss = _squared_norm(h).to(mse_loss.dtype) * (l2_coefficient / batch)
        else:
            l2_loss = mse_loss.new_zeros(())
        ctx.save_for_backward(x, W_enc, low_W_dec, b_dec, l1_weights, slopes, residual, means)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return mse_loss, l1_loss, l2_loss, sae_out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_mse: Tensor | None, g_l1: Tensor | None, g_l2: Tensor | None, g_out: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, W_enc, low_W_dec, b_dec, l1_weights, slopes, residual, means = ctx.saved_tensors
        settings: Settings[DenseCode] = ctx.settings
        code, batch, h = settings.code, x.shape[0], settings.code.values
        dtype, low = residual.dtype, h.dtype
        with torch.autocast(x.device.type, enabled=False):
            # Factors known on the host go into the products and fused operations: no operations of their own.
            by_mse, grad_out = output_gradients(residual, g_mse, g_out)
            low_grad_out = grad_out.to(low)
            penalty = None
            if g_l1 is not None and l1_weights is not None:
                penalty = _product_in(low, l1_weights.to(dtype), g_l1)
            if penalty is None or slopes is not None:
                grad_pre = torch.mm(low_grad_out, low_W_dec.t())
            else:
                grad_pre = torch.addmm(penalty, low_grad_out, low_W_dec.t(), beta=1.0 / batch)
            if penalty is not None and slopes is not None:
                grad_pre.addcmul_(slopes.to(low), penalty, value=1.0 / batch)
            if g_l2 is not None and settings.l2_coefficient:
                grad_pre.addcmul_(h, g_l2, value=2.0 * settings.l2_coefficient / batch)
            torch.ops.aten.threshold_backward.grad_input(grad_pre, h, 0, grad_input=grad_pre)
            grad_W_dec = (h.t() @ low_grad_out).to(dtype)
            inputs = code.encoder_input
            if inputs is None:
                inputs = settings.encoder_input(x, W_enc, b_dec).to(low)  # a code made elsewhere
            # Born in the parameter's memory layout.
            grad_W_enc = inputs.t() @ grad_pre if W_enc.is_contiguous() else (grad_pre.t() @ inputs).t()
            grad_b_enc = grad_pre.sum(dim=0, dtype=dtype)
            grad_b_dec = settings.grad_b_dec(grad_out, W_enc, grad_b_enc)
            grad_x = grad_weights = None
            if ctx.needs_input_grad[0]:
                grad_x = input_gradient((grad_pre @ W_enc.to(low).t()).to(dtype), by_mse, x)
            if ctx.needs_input_grad[5] and g_l1 is not None:
                grad_weights = (means * g_l1).to(l1_weights.dtype)
        grads = (grad_x, grad_W_enc.to(dtype), grad_b_enc, grad_W_dec, grad_b_dec, grad_weights)
        return *grads, None, None


def dense_terms(
    x: Tensor, parameters: tuple[Tensor, ...], l1_weights: Tensor | None, slopes: Tensor | None,
    settings: Settings[DenseCode],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(mse_loss, l1_loss, l2_loss, sae_out)``; ``parameters`` are ``W_enc, b_enc, W_dec, b_dec``."""
    return _DenseTerms.apply(x, *parameters, l1_weights, slopes, settings)
