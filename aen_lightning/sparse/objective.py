"""The loss of a code with exact gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from aen_lightning.sparse import backend
from aen_lightning.sparse.codes import DenseCode, SparseCode
from aen_lightning.sparse.dense import dense_terms
from aen_lightning.sparse.encoding import product_dtype
from aen_lightning.sparse.functions import activations, decode, per_entry
from aen_lightning.sparse.kernel_loss import kernel_terms
from aen_lightning.sparse.terms import Settings


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
    slopes: Tensor | None = None,
    l2_coefficient: float = 0.0,
    apply_b_dec_to_input: bool = True,
) -> SparseLoss:
    r"""Loss of a batch given its code, with exact gradients of every parameter through an ordinary ``backward()``.

    .. math::
        \frac1B \sum_b \|\hat x_b - x_b\|^2
        + \frac1B \sum_{bj} \mathtt{l1\_weights}_j \, \mathtt{slopes}_{bj} \, h_{bj} + \frac{l_2}{B} \sum_{bj} h_{bj}^2

    ``code`` must come from the same ``x`` and the same, unchanged parameters: the gradients of ``W_enc``, ``b_enc``
    and ``b_dec`` (and of ``x``, if it asks for one) go through the encoder as though it had been computed here.
    Activations that the code left out (zero, or not among the k largest, or under a threshold) have no gradient.

    Args:
        x: (batch, d_in) activations; the target of the reconstruction and the input of the encoder.
        code: From :func:`encode`, :func:`encode_topk`, :func:`encode_batch_topk` or :func:`encode_dense`.
        W_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        W_dec: (d_sae, d_in).
        b_dec: (d_in,).
        l1_weights: (d_sae,) cost of one unit of each feature's activation, coefficient included; None for no L1
            term. For the adaptive penalty ``l1 * u``, detached. It may carry a graph: SAELens's standard SAE is
            ``l1 * W_dec.norm(dim=1)``, whose gradient then reaches ``W_dec``.
        slopes: Factor on the cost of each activation, of the shape of ``code.values``; None for 1. Constant in the
            gradient. With the slope :math:`\varphi'(h)` of a concave penalty this is its local linear approximation
            (Zou and Li 2008): the gradient is that of :math:`\varphi`, the term that is reported is not.
        l2_coefficient: Of the squared activations; 0 for none.
        apply_b_dec_to_input: Whether the code was made with ``b_dec`` subtracted from ``x``.
    Raises:
        ValueError: If the code belongs to another batch or dictionary size, or the weights or slopes to another code.
    """
    expected = (x.shape[0], W_dec.shape[0])
    if code.shape != expected:
        raise ValueError(f"the code is {code.shape}, but x and W_dec make (batch, d_sae) = {expected}")
    if l1_weights is not None and l1_weights.shape != W_dec.shape[:1]:
        raise ValueError(f"l1_weights must be (d_sae,) = ({W_dec.shape[0]},), got {tuple(l1_weights.shape)}")
    if slopes is not None:
        if l1_weights is None:
            raise ValueError("slopes are factors on the L1 term: give l1_weights, too")
        if slopes.shape != code.values.shape:
            raise ValueError(
                f"slopes must have the shape of code.values, {tuple(code.values.shape)}, got "
                f"{tuple(slopes.shape)}"
            )
        slopes = slopes.detach()
    common = (l2_coefficient, apply_b_dec_to_input, product_dtype(W_enc))
    parameters = (W_enc, b_enc, W_dec, b_dec)
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(code, DenseCode):
            return SparseLoss(*dense_terms(x, parameters, l1_weights, slopes, Settings(code, *common)))
        if backend.triton_serves(x.device):
            return SparseLoss(*kernel_terms(x, parameters, l1_weights, slopes, Settings(code, *common)))
        values = activations(x, W_enc, b_enc, b_dec if apply_b_dec_to_input else None, code)
        sae_out = decode(values, W_dec, b_dec, code)
        return SparseLoss(
            mean_squared_error(sae_out, x),
            *penalty_terms(values, code, l1_weights, slopes, l2_coefficient),
            sae_out,
        )


def mean_squared_error(sae_out: Tensor, x: Tensor) -> Tensor:
    """Squared error summed over d_in, averaged over the batch."""
    return mse_loss(sae_out, x.to(sae_out.dtype), reduction="sum") / x.shape[0]


def penalty_terms(
    values: Tensor, code: SparseCode, l1_weights: Tensor | None, slopes: Tensor | None, l2_coefficient: float
) -> tuple[Tensor, Tensor]:
    """The L1 and the L2 term of ``values`` (nnz,) at the code's entries; arguments as for :func:`loss`."""
    batch = code.shape[0]
    l1_loss = l2_loss = values.new_zeros(())
    if l1_weights is not None:
        weights = per_entry(l1_weights.to(values.dtype), code)
        l1_loss = torch.dot(values, weights if slopes is None else weights * slopes.to(values.dtype)) / batch
    if l2_coefficient:
        l2_loss = torch.dot(values, values) * (l2_coefficient / batch)
    return l1_loss, l2_loss
