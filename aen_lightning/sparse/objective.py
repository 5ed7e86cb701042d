"""The loss of a code and its exact gradients, computed on the non-zeros."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from aen_lightning.sparse.codes import DenseCode, SparseCode, csr, segment_sums
from aen_lightning.sparse.encoding import encoder_input


class SparseLoss(NamedTuple):
    """The terms of the objective, scalars of the parameters' dtype, and the reconstruction.

    ``mse_loss`` is summed over d_in and averaged over the batch, as SAELens reports it; ``l1_loss`` and ``l2_loss``
    are already weighted, as SAELens wants auxiliary losses. ``sae_out`` is (batch, d_in) and differentiable too.
    """

    mse_loss: Tensor
    l1_loss: Tensor
    l2_loss: Tensor
    sae_out: Tensor

    @property
    def loss(self) -> Tensor:
        """The sum of the three terms."""
        return self.mse_loss + self.l1_loss + self.l2_loss


_READS_PER_ROW = 16
_CACHE_BYTES = 2**21  # one core's L2, roughly
_COLUMNS = 64


def _csr_mm(offsets: Tensor, columns: Tensor, values: Tensor, dense: Tensor) -> Tensor:
    """CSR times dense, (n, m) @ (m, d) -> (n, d). PyTorch's embedding bag is this product, for every device and
    dtype, and on CPU twice as fast as ``torch.sparse`` when most rows are short."""
    rows, nnz = offsets.numel() - 1, columns.numel()
    if not nnz:
        return dense.new_zeros((rows, dense.shape[1]))

    def product(table: Tensor) -> Tensor:
        return embedding_bag(columns, table, offsets, mode="sum", per_sample_weights=values, include_last_offset=True)

    # Where each row of the table is read many times over and the table exceeds the cache, a few columns at a time
    # fit: measured 1.7 times faster, and a loss where a row is read only a few times.
    often = nnz >= _READS_PER_ROW * max(rows, dense.shape[0])
    if dense.device.type != "cpu" or not often or dense.nbytes <= _CACHE_BYTES:
        return product(dense)
    out = dense.new_empty((rows, dense.shape[1]))
    for i in range(0, dense.shape[1], _COLUMNS):
        out[:, i : i + _COLUMNS] = product(dense[:, i : i + _COLUMNS].contiguous())
    return out


_TRANSPOSE_BLOCK = 512


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """``gradient`` (d_sae, d_in) as (d_in, d_sae) in the memory layout of ``parameter``; no copy if feature-major."""
    if not parameter.is_contiguous():
        return gradient.t()
    out = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    for j in range(0, gradient.shape[0], _TRANSPOSE_BLOCK):  # in blocks that fit the cache
        out[:, j : j + _TRANSPOSE_BLOCK] = gradient[j : j + _TRANSPOSE_BLOCK].t()
    return out


def _squared_norm(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return torch.dot(flat, flat)  # no squared copy


class _Objective(torch.autograd.Function):
    """Forward from a code, backward to the parameters that made it (``code`` itself carries no graph)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        l1_weights: Tensor | None,
        code: SparseCode | DenseCode,
        l2_coefficient: float,
        apply_b_dec_to_input: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch = x.shape[0]
        target = x.to(W_dec.dtype)
        if isinstance(code, SparseCode):
            order, token_offsets = code.by_token
            sae_out = _csr_mm(token_offsets, code.features[order], code.values[order], W_dec)
            sae_out += b_dec
        else:
            sae_out = torch.addmm(b_dec, code.values, W_dec)
        residual = sae_out - target
        mse_loss = _squared_norm(residual) / batch
        l2_loss = mse_loss.new_zeros(())
        if l2_coefficient:
            l2_loss = _squared_norm(code.values) * (l2_coefficient / batch)
        l1_loss = mse_loss.new_zeros(())
        if l1_weights is not None:
            l1_loss = torch.dot(code.value_sums, l1_weights.to(code.value_sums.dtype)) / batch
        ctx.save_for_backward(x, W_enc, W_dec, b_dec, l1_weights, residual)
        ctx.code, ctx.l2_coefficient, ctx.apply_b_dec_to_input = code, l2_coefficient, apply_b_dec_to_input
        ctx.set_materialize_grads(False)
        return mse_loss, l1_loss, l2_loss, sae_out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_mse: Tensor | None, g_l1: Tensor | None, g_l2: Tensor | None, g_out: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, W_enc, W_dec, b_dec, l1_weights, residual = ctx.saved_tensors
        code, batch = ctx.code, x.shape[0]
        shift = b_dec if ctx.apply_b_dec_to_input else None
        with torch.autocast(x.device.type, enabled=False):
            g_mse_out = None if g_mse is None else residual * (g_mse * (2.0 / batch))
            grad_out = g_mse_out if g_mse_out is not None else torch.zeros_like(residual)
            if g_out is not None:
                grad_out = grad_out + g_out
            penalty = None if g_l1 is None or l1_weights is None else l1_weights.to(W_dec.dtype) * (g_l1 / batch)
            shrink = None if g_l2 is None or not ctx.l2_coefficient else g_l2 * (2.0 * ctx.l2_coefficient / batch)
            inputs = encoder_input(x, W_enc, shift)
            need_x = ctx.needs_input_grad[0]
            if isinstance(code, SparseCode):
                grads = _sparse_backward(code, inputs, W_enc, W_dec, grad_out, penalty, shrink, need_x)
            else:
                grads = _dense_backward(code, inputs, W_enc, W_dec, grad_out, penalty, shrink, need_x)
            grad_W_enc, grad_b_enc, grad_W_dec, grad_x = grads
            grad_b_dec = grad_out.sum(dim=0)
            if ctx.apply_b_dec_to_input:
                # sum_b dL/dpre @ W_enc.T, with the sum taken first: one vector instead of a product over the batch.
                grad_b_dec -= W_enc @ grad_b_enc
            grad_weights = None
            if ctx.needs_input_grad[5] and g_l1 is not None:
                grad_weights = (code.value_sums * (g_l1 / batch)).to(l1_weights.dtype)
            if grad_x is not None:
                grad_x = (grad_x if g_mse_out is None else grad_x - g_mse_out).to(x.dtype)
        return grad_x, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, grad_weights, None, None, None


_Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]  # W_enc, b_enc, W_dec, encoder input


def _sparse_backward(
    code: SparseCode,
    inputs: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    grad_out: Tensor,
    penalty: Tensor | None,
    shrink: Tensor | None,
    need_x: bool,
) -> _Gradients:
    d_sae, batch = W_dec.shape[0], grad_out.shape[0]
    offsets, tokens, features, values = code.feature_offsets, code.tokens, code.features, code.values
    if code.nnz:
        # The gradient of h only where h > 0: elsewhere the ReLU stops it.
        pattern = csr(offsets, tokens, torch.zeros_like(values), (d_sae, batch))
        grad_pre = torch.sparse.sampled_addmm(pattern, W_dec, grad_out.t(), beta=0.0).values()
        if penalty is not None:
            grad_pre = grad_pre + penalty.index_select(0, features)
        if shrink is not None:
            grad_pre = grad_pre + values * shrink
    else:
        grad_pre = values
    grad_W_dec = _csr_mm(offsets, tokens, values, grad_out)
    grad_W_enc = _like(_csr_mm(offsets, tokens, grad_pre, inputs), W_enc)
    grad_b_enc = segment_sums(grad_pre, offsets)
    grad_x = None
    if need_x:
        order, token_offsets = code.by_token
        grad_x = _csr_mm(token_offsets, features[order], grad_pre[order], W_enc.t().contiguous())
    return grad_W_enc, grad_b_enc, grad_W_dec, grad_x


def _dense_backward(
    code: DenseCode,
    inputs: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    grad_out: Tensor,
    penalty: Tensor | None,
    shrink: Tensor | None,
    need_x: bool,
) -> _Gradients:
    h = code.values
    grad_W_dec = h.t() @ grad_out
    grad_pre = grad_out @ W_dec.t()
    if penalty is not None:
        grad_pre += penalty
    if shrink is not None:
        grad_pre.addcmul_(h, shrink)
    grad_pre = torch.ops.aten.threshold_backward(grad_pre, h, 0)
    grad_W_enc = inputs.t() @ grad_pre if W_enc.is_contiguous() else (grad_pre.t() @ inputs).t()
    return grad_W_enc, grad_pre.sum(dim=0), grad_W_dec, grad_pre @ W_enc.t() if need_x else None


@torch.compiler.disable
def loss(
    x: Tensor,
    code: SparseCode | DenseCode,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    l1_weights: Tensor | None = None,
    l2_coefficient: float = 0.0,
    apply_b_dec_to_input: bool = True,
) -> SparseLoss:
    r"""Loss of a batch given its code, with exact gradients of every parameter through an ordinary ``backward()``.

    .. math::
        \frac1B \sum_b \|\hat x_b - x_b\|^2 + \frac1B \sum_{bj} \mathtt{l1\_weights}_j h_{bj}
        + \frac{l_2}{B} \sum_{bj} h_{bj}^2

    ``code`` must come from the same ``x`` and the same, unchanged parameters: the gradients of ``W_enc``, ``b_enc``
    and ``b_dec`` (and of ``x``, if it asks for one) go through the encoder as though it had been computed here.

    Args:
        x: (batch, d_in) activations; the target of the reconstruction and the input of the encoder.
        code: From :func:`encode`, :func:`encode_topk` or :func:`encode_dense`.
        W_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        W_dec: (d_sae, d_in).
        b_dec: (d_in,).
        l1_weights: (d_sae,) cost of one unit of each feature's activation, coefficient included; None for no L1
            term. For the adaptive penalty ``l1 * u``, detached. It may carry a graph: SAELens's standard SAE is
            ``l1 * W_dec.norm(dim=1)``, whose gradient then reaches ``W_dec``.
        l2_coefficient: Of the squared activations; 0 for none.
        apply_b_dec_to_input: Whether the code was made with ``b_dec`` subtracted from ``x``.
    Raises:
        ValueError: If the code belongs to another batch or dictionary size, or a rescaled TopK code meets a penalty.
    """
    expected = (x.shape[0], W_dec.shape[0])
    if code.shape != expected:
        raise ValueError(f"the code is {code.shape}, but x and W_dec make (batch, d_sae) = {expected}")
    if l1_weights is not None and l1_weights.shape != W_dec.shape[:1]:
        raise ValueError(f"l1_weights must be (d_sae,) = ({W_dec.shape[0]},), got {tuple(l1_weights.shape)}")
    if isinstance(code, SparseCode) and code.scale is not None and (l1_weights is not None or l2_coefficient):
        raise ValueError("a TopK code rescaled by the decoder norm takes no L1 or L2 penalty; drop decoder_norm")
    with torch.autocast(x.device.type, enabled=False):
        out = _Objective.apply(x, W_enc, b_enc, W_dec, b_dec, l1_weights, code, l2_coefficient, apply_b_dec_to_input)
    return SparseLoss(*out)
