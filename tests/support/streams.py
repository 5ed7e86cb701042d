"""Deterministic activation streams for tests."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset


def batch_at(index: int, *, batch_size: int, d_in: int, seed: int = 0) -> Tensor:
    """Batch ``index``: low-rank non-negative mixtures with noise, so that an SAE has something to learn."""
    directions = torch.randn(2 * d_in, d_in, generator=torch.Generator().manual_seed(seed))
    directions = torch.nn.functional.normalize(directions, dim=-1)
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + index)
    codes = torch.rand(batch_size, 2 * d_in, generator=generator)
    codes = torch.where(codes > 0.9, 3 * codes, torch.zeros(()))
    return codes @ directions + 0.05 * torch.randn(batch_size, d_in, generator=generator)


class Batches(IterableDataset[Tensor]):
    """Endless batches; with ``world_size`` > 1, this rank's equal share of each."""

    def __init__(
        self, batch_size: int, d_in: int, *, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.batch_size, self.d_in, self.start = batch_size, d_in, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Tensor]:
        index = self.start
        while True:
            yield batch_at(index, batch_size=self.batch_size, d_in=self.d_in).chunk(self.world_size)[
                self.rank
            ]
            index += 1


def loader(batch_size: int = 64, d_in: int = 16, start: int = 0) -> DataLoader[Tensor]:
    return DataLoader(Batches(batch_size, d_in, start=start), batch_size=None)
