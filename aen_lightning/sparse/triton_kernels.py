"""The sparse step's products and its compaction as Triton kernels.

Every sum is taken by one program in a fixed order, so that a result repeats bit for bit. Offsets are int64. With
``TRITON_INTERPRET=1`` the kernels run on a CPU, slowly, for tests. Only imported where Triton is.
"""

# Kernels take pointers and are no typed Python; Triton need not be installed where types are checked.
# mypy: disable-error-code="no-untyped-def, import-not-found, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 1024  # read at a time by the compaction
_COLUMNS = 1024  # of a product's row held by one program
_SEGMENT = 128  # numbers of a segment read at a time

# Loops are `while`: Triton 3.6's interpreter refuses a range over a loaded number with NumPy 2.4.


@triton.jit
def _count(z, bias, floor, counts, sums, n_tokens, BLOCK: tl.constexpr):
    feature = tl.program_id(0).to(tl.int64)
    b, least = tl.load(bias + feature), tl.load(floor + feature)
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    added = tl.zeros((BLOCK,), dtype=b.dtype)
    start = 0
    while start < n_tokens:
        at = start + tl.arange(0, BLOCK)
        value = tl.load(z + feature * n_tokens + at, mask=at < n_tokens, other=0.0).to(b.dtype) + b
        # The complement of `<=`, so that a NaN stays.
        kept = (at < n_tokens) & ((value <= least) == 0)
        total += kept.to(tl.int64)
        added += tl.where(kept, value, 0.0)
        start += BLOCK
    tl.store(counts + feature, tl.sum(total, axis=0))
    tl.store(sums + feature, tl.sum(added, axis=0))


@triton.jit
def _write(
    z, bias, floor, offsets, tokens, features, values, first_feature, n_tokens, capacity, BLOCK: tl.constexpr
):
    feature = tl.program_id(0).to(tl.int64)
    b, least = tl.load(bias + feature), tl.load(floor + feature)
    base = tl.load(offsets + feature)
    start = 0
    while start < n_tokens:
        at = start + tl.arange(0, BLOCK)
        value = tl.load(z + feature * n_tokens + at, mask=at < n_tokens, other=0.0).to(b.dtype) + b
        kept = ((at < n_tokens) & ((value <= least) == 0)).to(tl.int64)
        to = base + tl.cumsum(kept, axis=0) - kept
        fits = (kept == 1) & (to < capacity)
        tl.store(tokens + to, at.to(tl.int64), mask=fits)
        tl.store(features + to, first_feature + feature + tl.zeros((BLOCK,), dtype=tl.int64), mask=fits)
        tl.store(values + to, value, mask=fits)
        base += tl.sum(kept, axis=0)
        start += BLOCK


@triton.jit
def _csr_mm(offsets, columns, values, dense, out, width, BLOCK: tl.constexpr, SUM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), dtype=SUM)
    while at < end:
        read = tl.load(dense + tl.load(columns + at) * width + column, mask=inside, other=0.0)
        total += tl.load(values + at).to(SUM) * read.to(SUM)
        at += 1
    tl.store(out + row * width + column, total, mask=inside)


@triton.jit
def _segment_sums(offsets, values, out, BLOCK: tl.constexpr, SUM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    total = tl.zeros((BLOCK,), dtype=SUM)
    while at < end:
        index = at + tl.arange(0, BLOCK)
        total += tl.load(values + index, mask=index < end, other=0.0).to(SUM)
        at += BLOCK
    tl.store(out + row, tl.sum(total, axis=0))


@triton.jit
def _at_entries(offsets, tokens, left, right, out, width, BLOCK: tl.constexpr, SUM: tl.constexpr):
    feature = tl.program_id(0).to(tl.int64)
    at, end = tl.load(offsets + feature), tl.load(offsets + feature + 1)
    column = tl.arange(0, BLOCK)
    inside = column < width
    own = tl.load(left + feature * width + column, mask=inside, other=0.0).to(SUM)
    while at < end:
        other = tl.load(right + tl.load(tokens + at) * width + column, mask=inside, other=0.0).to(SUM)
        tl.store(out + at, tl.sum(own * other, axis=0))
        at += 1


def compact(
    z: Tensor,
    bias: Tensor,
    floor: Tensor,
    first_feature: int,
    offsets: Tensor,
    tokens: Tensor,
    features: Tensor,
    values: Tensor,
    sums: Tensor,
) -> None:
    """Append the entries of a block of pre-activations that are above the floor to a code, without a synchronisation.

    Args:
        z: (n, batch) contiguous products of ``n`` features, without the bias; any floating dtype.
        bias: (n,), in the dtype of ``values``.
        floor: (n,), likewise; entries at or below it are left out.
        first_feature: Number of the block's first feature.
        offsets: (d_sae + 1,) int64; known up to ``first_feature``, written for the block.
        tokens: (capacity,) int64.
        features: (capacity,) int64.
        values: (capacity,). What does not fit is counted in ``offsets`` and not written: the code has overflowed
            when ``offsets[-1]`` is above the capacity.
        sums: (d_sae,), written for the block: the sum of each feature's entries, also those that do not fit.
    """
    n, batch = z.shape
    block = min(_TOKENS, triton.next_power_of_2(batch))
    counts = torch.empty(n, dtype=torch.int64, device=z.device)
    _count[(n,)](z, bias, floor, counts, sums[first_feature:], batch, BLOCK=block)
    torch.add(
        counts.cumsum(0), offsets[first_feature], out=offsets[first_feature + 1 : first_feature + 1 + n]
    )
    _write[(n,)](
        z,
        bias,
        floor,
        offsets[first_feature:],
        tokens,
        features,
        values,
        first_feature,
        batch,
        values.numel(),
        BLOCK=block,
    )


def csr_mm(offsets: Tensor, columns: Tensor, values: Tensor, dense: Tensor) -> Tensor:
    """CSR times dense, (n, m) @ (m, d) -> (n, d), in the dtype of ``dense``; summed in at least float32."""
    rows, width = offsets.numel() - 1, dense.shape[1]
    out = torch.empty((rows, width), dtype=dense.dtype, device=dense.device)
    block = min(_COLUMNS, triton.next_power_of_2(width))
    _csr_mm[(rows, triton.cdiv(width, block))](
        offsets, columns, values, dense.contiguous(), out, width, BLOCK=block, SUM=sum_dtype(dense)
    )
    return out


def at_entries(offsets: Tensor, tokens: Tensor, features: Tensor, dense: Tensor) -> Tensor:
    """(nnz,): ``features @ dense.T`` at the entries only, for (d_sae, d) and (batch, d)."""
    width = dense.shape[1]
    out = torch.zeros(tokens.shape, dtype=dense.dtype, device=dense.device)  # the padding of a code stays 0
    _at_entries[(features.shape[0],)](
        offsets,
        tokens,
        features.contiguous(),
        dense.contiguous(),
        out,
        width,
        BLOCK=triton.next_power_of_2(width),
        SUM=sum_dtype(dense),
    )
    return out


def segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`aen_lightning.sparse.codes.segment_sums`; what lies behind the last offset is left out."""
    out = torch.empty(offsets.numel() - 1, dtype=values.dtype, device=values.device)
    _segment_sums[(out.numel(),)](offsets, values, out, BLOCK=_SEGMENT, SUM=sum_dtype(values))
    return out


def sum_dtype(tensor: Tensor) -> tl.dtype:
    """In what a kernel adds up numbers of the tensor's dtype."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
