"""Adam, clipping, the projection of rows and their copy in low precision as one Triton kernel."""

# Kernels take pointers and are no typed Python; Triton need not be installed where types are checked.
# mypy: disable-error-code="no-untyped-def, import-not-found, untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from aen_lightning.sparse.row_adam import Hyperparameters


@triton.jit
def _squares(grad, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    g = tl.load(grad + row * width + column, mask=column < width, other=0.0)
    square = tl.sum(g * g, axis=0)
    # a square may be too small for float32: a row that is not zero must not look like one
    largest = tl.max(tl.abs(g), axis=0)
    tl.store(out + row, tl.where((largest > 0) & (square == 0), 1e-38, square))


@triton.jit
def _adam(
    param, grad, exp_avg, exp_avg_sq, silent, squares, clip, norms, low, width,
    step_size, beta1, rest1, log_beta1, beta2, rest2, log_beta2, correction2, eps, cold_after,
    BLOCK: tl.constexpr, PROJECT: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n_silent = tl.load(silent + row)
    # the complement of `== 0`, so that a NaN counts
    active = (tl.load(squares + row) == 0) == 0
    if active | (n_silent < cold_after):
        column = tl.arange(0, BLOCK)
        inside = column < width
        at = row * width + column
        missed = tl.where(active, tl.maximum(n_silent - cold_after, 0), 0).to(tl.float32)
        # not `inside & active`: a scalar of one bit is not broadcast well by the interpreter of Triton 3.9
        moved = column < tl.where(active, width, 0)
        g = tl.load(grad + at, mask=moved, other=0.0) * tl.load(clip)
        m = tl.load(exp_avg + at, mask=inside, other=0.0) * (tl.exp2(missed * log_beta1) * beta1) + rest1 * g
        v = (
            tl.load(exp_avg_sq + at, mask=inside, other=0.0) * (tl.exp2(missed * log_beta2) * beta2)
            + rest2 * g * g
        )
        p = tl.load(param + at, mask=inside, other=0.0) - step_size * m / (tl.sqrt(v) / correction2 + eps)
        if PROJECT:
            norm = tl.sqrt(tl.sum(tl.where(inside, p * p, 0.0), axis=0))
            scale = tl.load(norms + row) / tl.maximum(norm, 1e-12)
            # a row that is right to rounding stays as it is
            p = p * tl.where(tl.abs(scale - 1) <= 8 * 1.1920929e-07, 1.0, scale)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
        tl.store(param + at, p, mask=inside)
        if COPY:
            tl.store(low + at, p, mask=inside)
    tl.store(silent + row, tl.where(active, 0, n_silent + 1))


def squares(grad: Tensor) -> Tensor:
    """(rows,) sums of squares of a contiguous (rows, width); above 0 for every row that is not zero."""
    rows, width = grad.shape
    out = torch.empty(rows, dtype=grad.dtype, device=grad.device)
    _squares[(rows,)](grad, out, width, BLOCK=triton.next_power_of_2(width), num_warps=_warps(width))
    return out


def update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    silent: Tensor,
    row_squares: Tensor,
    clip: Tensor,
    norms: Tensor | None,
    low: Tensor | None,
    h: Hyperparameters,
) -> None:
    """As :func:`aen_lightning.sparse.row_adam.update_rows`, on contiguous float32 matrices."""
    rows, width = param.shape
    _adam[(rows,)](
        param, grad, exp_avg, exp_avg_sq, silent, row_squares, clip,
        clip if norms is None else norms, param if low is None else low, width,
        h.step_size, h.beta1, 1 - h.beta1, _log2(h.beta1), h.beta2, 1 - h.beta2, _log2(h.beta2),
        h.correction2, h.eps, h.cold_after,
        BLOCK=triton.next_power_of_2(width), PROJECT=norms is not None, COPY=low is not None,
        num_warps=_warps(width),
    )  # fmt: skip


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -1e4  # finite: times 0 missed steps it must be 0


def _warps(width: int) -> int:
    return max(4, min(16, triton.next_power_of_2(width) // 512))
