"""Decoding with its loss, and the backward pass feature by feature, as Triton kernels.

The backward pass reads the batch and its gradient once for everything that a feature needs of them: the gradient of
its activations, of both its weight rows and of its bias. A feature that fires often is split into chunks, whose sums
are added in their order, so that a result repeats bit for bit.
"""

# Kernels take pointers and are no typed Python; Triton need not be installed where types are checked.
# mypy: disable-error-code="no-untyped-def, import-not-found, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aen_lightning.sparse.triton_kernels import sum_dtype

_COLUMNS = 1024  # of a token's row held by one program
_CHUNK = 256  # tokens of a feature that one program goes through


@triton.jit
def _decode(
    offsets, features, values, table, b_dec, x, out, residual, squares, width, BLOCK: tl.constexpr, SUM: tl.constexpr
):  # fmt: skip
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at, end = tl.load(offsets + token), tl.load(offsets + token + 1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.load(b_dec + column, mask=inside, other=0.0).to(SUM)
    while at < end:
        row = tl.load(table + tl.load(features + at) * width + column, mask=inside, other=0.0)
        total += tl.load(values + at).to(SUM) * row.to(SUM)
        at += 1
    error = total - tl.load(x + token * width + column, mask=inside, other=0.0).to(SUM)
    tl.store(out + token * width + column, total, mask=inside)
    tl.store(residual + token * width + column, error, mask=inside)
    square = tl.sum(tl.where(inside, error * error, 0.0), axis=0)
    tl.store(squares + token * tl.num_programs(1) + part, square)


@triton.jit
def _backward(
    feature_of, chunk_offsets, split_offsets, offsets, tokens, values, table, grad_out, inputs, l1, slopes, l2,
    grad_pre, grad_W_dec, grad_W_enc, grad_b_enc, split_W_dec, split_W_enc, split_b_enc, d_sae, width,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, SLOPES: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    feature = tl.load(feature_of + chunk)
    if feature < d_sae:
        first = tl.load(chunk_offsets + feature)
        at = tl.load(offsets + feature) + (chunk - first) * CHUNK
        end = tl.minimum(at + CHUNK, tl.load(offsets + feature + 1))
        column = tl.arange(0, BLOCK)
        inside = column < width
        own = tl.load(table + feature * width + column, mask=inside, other=0.0).to(SUM)
        cost, ridge = tl.load(l1 + feature).to(SUM), tl.load(l2).to(SUM)
        to_W_dec = tl.zeros((BLOCK,), dtype=SUM)
        to_W_enc = tl.zeros((BLOCK,), dtype=SUM)
        to_b_enc = cost * 0
        while at < end:
            row = tl.load(tokens + at) * width
            g = tl.load(grad_out + row + column, mask=inside, other=0.0).to(SUM)
            x = tl.load(inputs + row + column, mask=inside, other=0.0).to(SUM)
            h = tl.load(values + at).to(SUM)
            paid = cost
            if SLOPES:
                paid = cost * tl.load(slopes + at).to(SUM)
            d = tl.sum(own * g, axis=0) + paid + ridge * h
            tl.store(grad_pre + at, d)
            to_W_dec += h * g
            to_W_enc += d * x
            to_b_enc += d
            at += 1
        if tl.load(chunk_offsets + feature + 1) - first == 1:
            tl.store(grad_W_dec + feature * width + column, to_W_dec, mask=inside)
            tl.store(grad_W_enc + feature * width + column, to_W_enc, mask=inside)
            tl.store(grad_b_enc + feature, to_b_enc)
        else:
            to = tl.load(split_offsets + feature) + chunk - first
            tl.store(split_W_dec + to * width + column, to_W_dec, mask=inside)
            tl.store(split_W_enc + to * width + column, to_W_enc, mask=inside)
            tl.store(split_b_enc + to, to_b_enc)


@triton.jit
def _join(
    chunk_offsets, split_offsets, grad_W_dec, grad_W_enc, grad_b_enc, split_W_dec, split_W_enc, split_b_enc,
    width, BLOCK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    n = tl.load(chunk_offsets + feature + 1) - tl.load(chunk_offsets + feature)
    if n > 1:
        at = tl.load(split_offsets + feature)
        end = at + n
        column = tl.arange(0, BLOCK)
        inside = column < width
        to_W_dec = tl.zeros((BLOCK,), dtype=SUM)
        to_W_enc = tl.zeros((BLOCK,), dtype=SUM)
        to_b_enc = tl.load(split_b_enc + at) * 0
        while at < end:
            to_W_dec += tl.load(split_W_dec + at * width + column, mask=inside, other=0.0)
            to_W_enc += tl.load(split_W_enc + at * width + column, mask=inside, other=0.0)
            to_b_enc += tl.load(split_b_enc + at)
            at += 1
        tl.store(grad_W_dec + feature * width + column, to_W_dec, mask=inside)
        tl.store(grad_W_enc + feature * width + column, to_W_enc, mask=inside)
        tl.store(grad_b_enc + feature, to_b_enc)


def decode(
    token_offsets: Tensor, features: Tensor, values: Tensor, table: Tensor, b_dec: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction, its residual and the sum of its squares.

    Args:
        token_offsets: (batch + 1,) int64.
        features: (n,) int64, by token.
        values: (n,), likewise.
        table: (d_sae, d_in) contiguous decoder, any floating dtype.
        b_dec: (d_in,).
        x: (batch, d_in), the target.
    Returns:
        ``sae_out`` and ``sae_out - x``, (batch, d_in), and a scalar, of the dtype of ``b_dec``.
    """
    batch, width = x.shape
    block = min(_COLUMNS, triton.next_power_of_2(width))
    parts = triton.cdiv(width, block)
    out, residual = (torch.empty((batch, width), dtype=b_dec.dtype, device=x.device) for _ in range(2))
    squares = torch.empty((batch, parts), dtype=b_dec.dtype, device=x.device)
    _decode[(batch, parts)](
        token_offsets, features, values, table, b_dec, x.contiguous(), out, residual, squares, width,
        BLOCK=block, SUM=sum_dtype(b_dec),
    )  # fmt: skip
    return out, residual, squares.sum()


def backward(
    offsets: Tensor,
    tokens: Tensor,
    values: Tensor,
    table: Tensor,
    grad_out: Tensor,
    inputs: Tensor,
    l1: Tensor,
    slopes: Tensor | None,
    l2: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of what a code's features own.

    The gradient of a pre-activation is ``table[j] . grad_out[b] + l1[j] * slopes + l2 * h`` where the code has an
    entry, else 0.

    Args:
        offsets: (d_sae + 1,) int64, at most the capacity.
        tokens: (capacity,) int64.
        values: (capacity,).
        table: (d_sae, d_in) contiguous decoder, any floating dtype.
        grad_out: (batch, d_in) contiguous gradient of the reconstruction, any floating dtype.
        inputs: (batch, d_in) contiguous, what the encoder multiplied, any floating dtype.
        l1: (d_sae,).
        slopes: (capacity,), None for 1.
        l2: Scalar.
    Returns:
        Of the pre-activations (capacity,) at the entries, else undefined; of ``W_dec`` and, feature by feature,
        ``W_enc``, (d_sae, d_in); of ``b_enc`` (d_sae,): all of the dtype of ``values``.
    """
    d_sae, width = table.shape
    capacity, device, dtype = values.numel(), values.device, values.dtype
    n_chunks = (offsets.diff() + (_CHUNK - 1)).div(_CHUNK, rounding_mode="floor").clamp_min(1)
    chunk_offsets = torch.zeros(d_sae + 1, dtype=torch.int64, device=device)
    torch.cumsum(n_chunks, 0, out=chunk_offsets[1:])
    split = n_chunks * (n_chunks > 1)
    split_offsets = split.cumsum(0) - split
    # as many programs as there can be chunks, known without asking the device
    programs = d_sae + capacity // _CHUNK
    feature_of = torch.searchsorted(
        chunk_offsets[1:], torch.arange(programs, dtype=torch.int64, device=device), right=True
    )
    room = 2 * (capacity // _CHUNK) + 1

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    grads = empty(d_sae, width), empty(d_sae, width), empty(d_sae)
    splits = empty(room, width), empty(room, width), empty(room)
    grad_pre = empty(capacity)
    block, kind = triton.next_power_of_2(width), sum_dtype(values)
    warps = max(4, min(16, block // 512))
    _backward[(programs,)](
        feature_of, chunk_offsets, split_offsets, offsets, tokens, values, table, grad_out, inputs, l1,
        values if slopes is None else slopes, l2, grad_pre, *grads, *splits, d_sae, width,
        BLOCK=block, CHUNK=_CHUNK, SLOPES=slopes is not None, SUM=kind, num_warps=warps,
    )  # fmt: skip
    _join[(d_sae,)](
        chunk_offsets, split_offsets, *grads, *splits, width, BLOCK=block, SUM=kind, num_warps=warps
    )
    grad_W_dec, grad_W_enc, grad_b_enc = grads
    return grad_pre, grad_W_dec, grad_W_enc, grad_b_enc
