"""The products of a sparse step: of a code with a dense matrix, and of two dense matrices where the code is not zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from aen_lightning.sparse import backend
from aen_lightning.sparse.codes import SparseCode, csr

_READS_PER_ROW = 16
_CACHE_BYTES = 2**21  # one core's L2, roughly
_COLUMNS = 64


def csr_mm(offsets: Tensor, columns: Tensor, values: Tensor, dense: Tensor) -> Tensor:
    """CSR times dense, (n, m) @ (m, d) -> (n, d). PyTorch's embedding bag is this product, for every device and
    dtype, and on CPU twice as fast as ``torch.sparse`` when most rows are short."""
    rows, nnz = offsets.numel() - 1, columns.numel()
    if backend.triton_serves(dense.device):
        from aen_lightning.sparse import triton_kernels

        return triton_kernels.csr_mm(offsets, columns, values, dense)
    if not nnz:
        return dense.new_zeros((rows, dense.shape[1]))

    def product(table: Tensor) -> Tensor:
        return embedding_bag(
            columns, table, offsets, mode="sum", per_sample_weights=values, include_last_offset=True
        )

    # Where each row of the table is read many times over and the table exceeds the cache, a few columns at a time
    # fit: measured 1.7 times faster, and a loss where a row is read only a few times.
    often = nnz >= _READS_PER_ROW * max(rows, dense.shape[0])
    if dense.device.type != "cpu" or not often or dense.nbytes <= _CACHE_BYTES:
        return product(dense)
    out = dense.new_empty((rows, dense.shape[1]))
    for i in range(0, dense.shape[1], _COLUMNS):
        out[:, i : i + _COLUMNS] = product(dense[:, i : i + _COLUMNS].contiguous())
    return out


def by_token_mm(code: SparseCode, values: Tensor, dense: Tensor) -> Tensor:
    """(batch, d): ``values`` at the code's entries, as a (batch, d_sae) matrix, times ``dense`` (d_sae, d)."""
    order, token_offsets = code.by_token
    return csr_mm(token_offsets, code.features[order], values[order], dense)


def by_feature_mm(code: SparseCode, values: Tensor, dense: Tensor) -> Tensor:
    """(d_sae, d): ``values`` at the code's entries, as a (d_sae, batch) matrix, times ``dense`` (batch, d)."""
    return csr_mm(code.feature_offsets, code.tokens, values, dense)


def at_entries(code: SparseCode, features: Tensor, tokens: Tensor) -> Tensor:
    """(nnz,): ``features @ tokens.T`` at the code's entries only, for (d_sae, d) and (batch, d)."""
    if backend.triton_serves(tokens.device):
        from aen_lightning.sparse import triton_kernels

        return triton_kernels.at_entries(code.feature_offsets, code.tokens, features, tokens)
    if not code.nnz:
        return code.values
    batch, d_sae = code.shape
    pattern = csr(code.feature_offsets, code.tokens, torch.zeros_like(code.values), (d_sae, batch))
    return torch.sparse.sampled_addmm(pattern, features, tokens.t(), beta=0.0).values()
