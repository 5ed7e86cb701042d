"""The two forms of a batch's code: on its non-zeros, and dense."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from aen_lightning.sparse import backend


@cache
def _beta_notice_given() -> None:
    # PyTorch says once per process that CSR support is in beta; the operators used here are tested.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        torch.eye(1).to_sparse_csr()


def csr(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A PyTorch CSR tensor over the given buffers: no copy, no invariant checks (each is a synchronisation)."""
    _beta_notice_given()
    return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


@dataclass(frozen=True)
class SparseCode:
    """Feature activations of a batch, non-zeros only, by feature and then by token (CSC of (batch, d_sae)).

    Args:
        feature_offsets: (d_sae + 1,) int64; feature j has the entries
            ``feature_offsets[j]:feature_offsets[j + 1]``.
        tokens: (nnz,) int64, row of each entry in the batch.
        features: (nnz,) int64, feature of each entry, ascending.
        values: (nnz,) activations, positive (NaN is kept, so that a diverged run shows). No autograd graph.
        shape: (batch, d_sae).
    """

    feature_offsets: Tensor
    tokens: Tensor
    features: Tensor
    values: Tensor
    shape: tuple[int, int]

    @property
    def nnz(self) -> int:
        """Number of non-zeros. Known on the host: reading it costs no synchronisation."""
        return self.values.numel()

    @property
    def least(self) -> Tensor:
        """Scalar: the least activation of the code, which must have one."""
        return self.values.min()

    @property
    def density(self) -> float:
        """Share of non-zeros, in [0, 1]."""
        return self.nnz / max(1, self.shape[0] * self.shape[1])

    @cached_property
    def feature_counts(self) -> Tensor:
        """(d_sae,) int64: on how many tokens of the batch each feature fired."""
        return self.feature_offsets.diff()

    @cached_property
    def feature_sums(self) -> Tensor:
        """(d_sae,): sum over the batch of each feature's activation."""
        return segment_sums(self.values, self.feature_offsets)

    @cached_property
    def feature_means(self) -> Tensor:
        """(d_sae,): mean over the batch of each feature's activation."""
        return self.feature_sums / self.shape[0]

    @property
    def l0(self) -> Tensor:
        """Mean number of active features per token (a count), float32 scalar."""
        return self.feature_counts.sum() / self.shape[0]

    @cached_property
    def by_token(self) -> tuple[Tensor, Tensor]:
        """``(order, token_offsets)``: the permutation of the entries into token order, features ascending in
        each token, and the (batch + 1,) int64 offsets of the tokens. Together the CSR form."""
        batch = self.shape[0]
        key = self.tokens.to(torch.int16 if batch < 2**15 else torch.int32)  # radix passes over fewer bytes
        order = key.sort(stable=True).indices
        return order, offsets_of(self.tokens, batch)

    def csr(self) -> Tensor:
        """(batch, d_sae) ``torch.sparse_csr`` tensor of the activations."""
        order, token_offsets = self.by_token
        return csr(token_offsets, self.features[order], self.values[order], self.shape)

    def feature_acts(self) -> Tensor:
        """(batch, d_sae) coalesced ``torch.sparse_coo`` tensor, in which SAELens takes sparse activations."""
        order, _ = self.by_token
        indices = torch.stack((self.tokens[order], self.features[order]))
        # Sorted by construction; saying so spares the sort that coalesce() would repeat.
        return torch.sparse_coo_tensor(
            indices, self.values[order], self.shape, is_coalesced=True, check_invariants=False
        )

    def to_dense(self) -> Tensor:
        """(batch, d_sae) dense activations."""
        dense = self.values.new_zeros(self.shape)
        dense[self.tokens, self.features] = self.values
        return dense


@dataclass(frozen=True)
class DenseCode:
    """Feature activations of a batch as one (batch, d_sae) tensor, for codes too dense to gain from sparsity.

    It answers to the same statistics as :class:`SparseCode`, so that a caller need not ask which one it holds.
    ``values`` may have half precision (an encoder under autocast); sums are then taken in float32.

    Args:
        values: (batch, d_sae) activations. No autograd graph.
        encoder_input: (batch, d_in), what the encoder multiplied, for the backward pass; None: computed there anew.
    """

    values: Tensor
    encoder_input: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, d_sae)."""
        return self.values.shape[0], self.values.shape[1]

    @cached_property
    def feature_counts(self) -> Tensor:
        """(d_sae,) int64: on how many tokens of the batch each feature fired."""
        return self.values.count_nonzero(dim=0)

    @cached_property
    def feature_sums(self) -> Tensor:
        """(d_sae,): sum over the batch of each feature's activation, at least float32."""
        dtype = self.values.dtype
        return self.values.sum(dim=0, dtype=dtype if dtype == torch.float64 else torch.float32)

    @cached_property
    def feature_means(self) -> Tensor:
        """(d_sae,): mean over the batch of each feature's activation, at least float32."""
        return self.feature_sums / self.shape[0]

    @property
    def l0(self) -> Tensor:
        """Mean number of active features per token (a count), float32 scalar."""
        return self.feature_counts.sum() / self.shape[0]

    def feature_acts(self) -> Tensor:
        """(batch, d_sae) dense activations, as SAELens takes them."""
        return self.values

    def to_dense(self) -> Tensor:
        """(batch, d_sae) dense activations."""
        return self.values


def offsets_of(index: Tensor, size: int) -> Tensor:
    """(size + 1,) int64 start of each value's run, were ``index`` (int64, values in [0, size)) sorted."""
    offsets = index.new_zeros(size + 1)
    torch.cumsum(torch.bincount(index, minlength=size), dim=0, out=offsets[1:])
    return offsets


def segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of ``values`` (nnz,) in each run that ``offsets`` (n + 1,) marks, 0 where it is empty; shape (n,)."""
    if backend.triton_serves(values.device):
        from aen_lightning.sparse import triton_kernels

        return triton_kernels.segment_sums(values, offsets)
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0.0)
