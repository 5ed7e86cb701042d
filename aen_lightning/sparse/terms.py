"""What the losses by the kernels and of a dense code have in common: their settings, and ends of their backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from aen_lightning.sparse.codes import DenseCode, SparseCode
from aen_lightning.sparse.encoding import encoder_input

Code = TypeVar("Code", SparseCode, DenseCode)


@dataclass(frozen=True)
class Settings(Generic[Code]):
    """What a loss takes besides tensors with a gradient; as for :func:`~aen_lightning.sparse.loss`.

    ``low`` is the dtype in which the batch and its gradient are read, that of autocast.
    """

    code: Code
    l2_coefficient: float
    apply_b_dec_to_input: bool
    low: torch.dtype

    def encoder_input(self, x: Tensor, W_enc: Tensor, b_dec: Tensor) -> Tensor:
        """What the encoder multiplied, in ``low``."""
        return encoder_input(x, W_enc, b_dec if self.apply_b_dec_to_input else None, self.low)

    def grad_b_dec(self, grad_out: Tensor, W_enc: Tensor, grad_b_enc: Tensor) -> Tensor:
        """(d_in,), of the gradient of the reconstruction (batch, d_in) and that of the encoder's bias."""
        grad = grad_out.sum(dim=0)
        if not self.apply_b_dec_to_input:
            return grad
        # sum_b dL/dpre @ W_enc.T, with the sum taken first: one vector instead of a product over the batch.
        return torch.addmv(grad, W_enc, grad_b_enc, alpha=-1)


def output_gradients(
    residual: Tensor, g_mse: Tensor | None, g_out: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Gradient of the reconstruction (batch, d_in) by way of the squared error, and in all."""
    by_mse = None if g_mse is None else residual * (g_mse * (2.0 / residual.shape[0]))
    grad_out = torch.zeros_like(residual) if by_mse is None else by_mse
    return by_mse, grad_out if g_out is None else grad_out + g_out


def input_gradient(through_encoder: Tensor, by_mse: Tensor | None, x: Tensor) -> Tensor:
    """Gradient of a batch that is both the encoder's input and the target."""
    return (through_encoder if by_mse is None else through_encoder - by_mse).to(x.dtype)
