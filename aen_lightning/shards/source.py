"""What a data module needs of activations on disk, in whatever format they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class ActivationSource(ABC):
    """Rows of activations on disk, numbered from 0, in one or more memory-mapped parts.

    Attributes:
        path: Folder.
        d_in: Width at each hook point, keyed by ``hook_name``.
        dtype: On disk.
        context_size: Tokens the language model saw at once; None if not known.
        metadata: SAELens metadata about where the activations are from.
        part_sizes: Rows of each part.
    """

    path: Path
    d_in: dict[str, int]
    dtype: torch.dtype
    context_size: int | None
    metadata: dict[str, Any]
    part_sizes: list[int]

    @abstractmethod
    def part(self, index: int) -> dict[str, Tensor]:
        """The tensors of one part, mapped, not read: each hook point (n, d_in), and ``token_ids`` (n,) if
        there are any."""

    @cached_property
    def part_ends(self) -> NDArray[np.int64]:
        """Number of the row after the last one of each part."""
        return np.cumsum(np.asarray(self.part_sizes, dtype=np.int64))

    @property
    def n_tokens(self) -> int:
        """Rows in all."""
        return sum(self.part_sizes)

    def gather(
        self,
        rows: NDArray[np.int64],
        hook_names: Sequence[str],
        *,
        as_stored: bool = False,
        pin: bool = False,
    ) -> dict[str, Tensor]:
        """Read rows.

        Args:
            rows: Row numbers, ascending (so that each part is read once, and in order).
            hook_names: Which hook points.
            as_stored: Keep the dtype on disk.
            pin: Read into pinned memory, from which a GPU copies by itself.

        Returns:
            For each hook point a new tensor (len(rows), d_in), float32 unless ``as_stored``.
        """
        ends = self.part_ends
        first, last = np.searchsorted(ends, rows[[0, -1]], side="right") if len(rows) else (0, -1)
        cuts = np.searchsorted(rows, ends[first : last + 1])
        dtype = self.dtype if as_stored else torch.float32
        out = {h: torch.empty(len(rows), self.d_in[h], dtype=dtype, pin_memory=pin) for h in hook_names}
        at = 0
        for index, cut in zip(range(first, last + 1), cuts, strict=True):
            if cut > at:
                start = int(ends[index]) - self.part_sizes[index]
                local = torch.from_numpy(rows[at:cut] - start)
                tensors = self.part(index)
                for h, target in out.items():
                    # out= spares a copy, and needs equal dtypes
                    if tensors[h].dtype == target.dtype:
                        torch.index_select(tensors[h], 0, local, out=target[at:cut])
                    else:
                        target[at:cut] = tensors[h].index_select(0, local)
            at = int(cut)
        return out

    def token_ids(self) -> Tensor | None:
        """Token ids of all rows, (n_tokens,) int32 in memory; None if the set has none."""
        parts = [self.part(i).get("token_ids") for i in range(len(self.part_sizes))]
        ids = [p for p in parts if p is not None]
        return torch.cat(ids) if ids and len(ids) == len(parts) else None
