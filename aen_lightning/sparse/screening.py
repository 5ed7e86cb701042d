r"""Certified screening: a bfloat16 product that proves most pre-activations negative.

The encoder product is the floor of a sparse step, and 99 % of what it computes is thrown away by the ReLU.
Where the hardware multiplies bfloat16 several times faster than float32 (AMX, tensor cores), a rounded
product with a rigorous error bound decides which entries *can* be positive, and only those are computed in
full precision. The result is that of the full-precision product: no positive entry is missed (down to
float32's smallest normal number, below which hardware may flush to zero).

With round-to-nearest, :math:`\hat x = x + \delta_x` and :math:`|\delta_w| \le u |w|`, :math:`u = 2^{-8}`, so
that by Cauchy-Schwarz

.. math:: x \cdot w \le \hat x \cdot \hat w + \|w\| \left( \|\delta_x\| + u \|\hat x\| \right).

The bound has rank one and the bias rank two (a high and a low part), so all three ride in the product itself
as extra columns: one matrix product gives an upper bound of every pre-activation, and its sign decides.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from aen_lightning.sparse.precision import tf32_products

_UNIT_ROUNDOFF = 2.0**-8  # of bfloat16, round to nearest: |round(v) - v| <= u |v|
_ROUND_UP = 1 + 2.0**-6  # times this, then rounded to bfloat16, a positive number has not become smaller
_EXTRA_COLUMNS = 3  # error bound, high and low part of the bias
_COLUMN_MULTIPLE = 32  # bfloat16 tiles and vectors are 64 bytes wide


def screening_pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a bfloat16 product is so much faster than one in ``dtype`` on ``device`` that screening gains
    time.

    True for float32 on CPUs with AMX and on CUDA devices with bfloat16 tensor cores. There it needs TF32 off:
    with TF32 on the plain product is nearly as fast.
    """
    if dtype != torch.float32:
        return False
    if device.type == "cpu":
        return (
            bool(torch.cpu.get_capabilities().get("amx_bf16", False)) and torch.backends.mkldnn.is_available()
        )
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0) and not tf32_products()
    return False


def _accumulation_slack(d_in: int) -> float:
    # Float32 sums of n terms err by at most about n 2^-24 of the sum of magnitudes; doubled, to be safe.
    return (d_in + _EXTRA_COLUMNS + 8) * 2.0**-23


def _padded(columns: int) -> int:
    return -(-columns // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE


def screen_tokens(x: Tensor) -> Tensor:
    """The token side of the screening product.

    Args:
        x: (batch, d_in) float32 encoder input, ``b_dec`` already subtracted.
    Returns:
        (batch, d_in + 3, padded to a multiple of 32) bfloat16.
    """
    batch, d_in = x.shape
    rounded = x.to(torch.bfloat16)
    back = rounded.float()
    norm = torch.linalg.vector_norm(back, dim=1)
    bound = torch.linalg.vector_norm(x - back, dim=1)
    bound += (_UNIT_ROUNDOFF + _accumulation_slack(d_in)) * norm
    out = x.new_zeros((batch, _padded(d_in + _EXTRA_COLUMNS)), dtype=torch.bfloat16)
    out[:, :d_in] = rounded
    out[:, d_in] = bound * _ROUND_UP
    out[:, d_in + 1 : d_in + 3] = 1.0
    return out


def screen_features(weight: Tensor, norm: Tensor, bias: Tensor) -> Tensor:
    """The feature side of the screening product.

    Args:
        weight: (features, d_in) float32 encoder rows.
        norm: (features,) their L2 norms.
        bias: (features,) float32.
    Returns:
        (features, d_in + 3, padded to a multiple of 32) bfloat16: times :func:`screen_tokens` transposed, it
        gives an upper bound of ``weight @ x.T + bias[:, None]`` that is positive wherever the pre-activation
        is.
    """
    d_in = weight.shape[1]
    high = bias.to(torch.bfloat16)
    low = bias - high.float()
    low += low.abs() * (_ROUND_UP - 1) + bias.abs() * _accumulation_slack(d_in)
    extra = torch.stack((norm * _ROUND_UP, high.float(), low), dim=1)
    padding = _padded(d_in + _EXTRA_COLUMNS) - d_in - _EXTRA_COLUMNS
    return torch.cat((weight.to(torch.bfloat16), pad(extra, (0, padding)).to(torch.bfloat16)), dim=1)
