"""Codes whose size the host does not know: made, used and checked without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from aen_lightning.device_copies import HostCopy
from aen_lightning.sparse.codes import SparseCode


@dataclass(frozen=True)
class PaddedCode(SparseCode):
    """A code in tensors of fixed capacity, of which the offsets say how much is used; the rest is zeros.

    What is computed with it is right unless it :attr:`overflowed`. Statistics are right in any case.

    Args:
        counts: (d_sae,) int64, how often each feature fired.
        sums: (d_sae,), the sum of its activations.
        arriving: The number of non-zeros, on its way to the host.
        at_least: Non-zeros that there must be.
    """

    counts: Tensor
    sums: Tensor
    arriving: HostCopy
    at_least: int = 0

    @property
    def capacity(self) -> int:
        """Entries that there is room for."""
        return self.values.numel()

    @cached_property
    def nnz(self) -> int:
        """Number of non-zeros. Waits until the device has counted them, and for nothing that comes after."""
        return int(self.arriving.numbers())

    @property
    def overflowed(self) -> bool:
        """Whether there were more non-zeros than room, or fewer than there must be; waits as :attr:`nnz` does."""
        return not self.at_least <= self.nnz <= self.capacity

    @property
    def least(self) -> Tensor:
        """See base class."""
        return self.values.where(self._used, torch.inf).min()

    @property
    def _used(self) -> Tensor:
        return torch.arange(self.capacity, device=self.values.device) < self.feature_offsets[-1]

    @cached_property
    def feature_counts(self) -> Tensor:
        """See base class."""
        return self.counts

    @cached_property
    def feature_sums(self) -> Tensor:
        """See base class."""
        return self.sums

    @cached_property
    def by_token(self) -> tuple[Tensor, Tensor]:
        """See base class; what is not used comes last and belongs to no token."""
        batch = self.shape[0]
        key = torch.where(self._used, self.tokens, batch).to(torch.int16 if batch < 2**15 else torch.int32)
        ordered, order = key.sort(stable=True)
        ends = torch.arange(batch + 1, dtype=key.dtype, device=key.device)
        return order, torch.searchsorted(ordered, ends)

    def trimmed(self) -> SparseCode:
        """The code without the padding; waits as :attr:`nnz` does."""
        n = min(self.nnz, self.capacity)
        return SparseCode(
            self.feature_offsets, self.tokens[:n], self.features[:n], self.values[:n], self.shape
        )

    def csr(self) -> Tensor:
        """See base class."""
        return self.trimmed().csr()

    def feature_acts(self) -> Tensor:
        """See base class."""
        return self.trimmed().feature_acts()

    def to_dense(self) -> Tensor:
        """See base class."""
        return self.trimmed().to_dense()


def padded_code(
    offsets: Tensor, tokens: Tensor, features: Tensor, values: Tensor, sums: Tensor, shape: tuple[int, int],
    at_least: int = 0,
) -> PaddedCode:  # fmt: skip
    """A code of what a compaction wrote.

    Args:
        offsets: (d_sae + 1,) of all entries, also those that found no room.
        tokens: (capacity,).
        features: (capacity,).
        values: (capacity,).
        sums: (d_sae,).
        shape: (batch, d_sae).
        at_least: See :class:`PaddedCode`.
    """
    # no kernel may read past the end of a code that overflowed
    inside = offsets.clamp_max(values.numel())
    arriving = HostCopy(offsets[-1])
    return PaddedCode(inside, tokens, features, values, shape, offsets.diff(), sums, arriving, at_least)


def packed(
    tokens: Tensor, features: Tensor, values: Tensor, kept: Tensor, shape: tuple[int, int],
    segment_sums: Callable[[Tensor, Tensor], Tensor], n_entries: Tensor | None = None, at_least: int = 0,
) -> PaddedCode:  # fmt: skip
    """The code of those entries that are ``kept``, in feature order; of one feature they stay in theirs.

    Args:
        tokens: (n,).
        features: (n,).
        values: (n,).
        kept: (n,) bool.
        shape: (batch, d_sae).
        segment_sums: See :func:`~aen_lightning.sparse.codes.segment_sums`.
        n_entries: How many there would be with room for all; None: as many as are kept.
        at_least: See :class:`PaddedCode`.
    """
    d_sae = shape[1]
    key, order = torch.where(kept, features, d_sae).to(torch.int32).sort(stable=True)
    offsets = torch.searchsorted(key, torch.arange(d_sae + 1, dtype=torch.int32, device=key.device))
    used = key < d_sae
    values = torch.where(used, values[order], 0)
    code = padded_code(
        offsets, tokens[order], features[order], values, segment_sums(values, offsets), shape, at_least
    )
    if n_entries is None:
        return code
    arriving = HostCopy(n_entries)
    return PaddedCode(
        code.feature_offsets, code.tokens, code.features, code.values, shape, code.counts, code.sums, arriving,
        at_least,
    )  # fmt: skip
