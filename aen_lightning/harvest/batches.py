"""From work orders to the batches of one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aen_lightning.data.token_filter import TokenFilter
from aen_lightning.harvest.tokens import TokenShard, batches_of, position_ids_of, read_token_shard


class HarvestBatches:
    """Iterable over batches for ``HarvestModule.predict_step``; also says to ``ShardWriter`` where each goes.

    Args:
        folder: Of the set.
        work: Shard, number of the batch in it, and whether the result is wanted.
        batch_size: Rows a batch.
        token_filter: Tells by its id whether a token is kept.
        mask_documents: Give ``position_ids`` that begin again at each document.
    """

    def __init__(
        self,
        folder: Path,
        work: Sequence[tuple[int, int, bool]],
        *,
        batch_size: int,
        token_filter: TokenFilter,
        mask_documents: bool,
    ) -> None:
        self.folder, self.work, self.batch_size = folder, work, batch_size
        self.token_filter, self.mask_documents = token_filter, mask_documents

    def __len__(self) -> int:
        return len(self.work)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loaded: tuple[int, TokenShard, list[Tensor], Tensor] | None = None
        for index, number, wanted in self.work:
            if loaded is None or loaded[0] != index:
                shard = read_token_shard(self.folder, index)
                ends = shard.lengths.long().cumsum(0)
                loaded = (index, shard, batches_of(shard.lengths, self.batch_size), ends)
            _, shard, batches, ends = loaded
            batch = self._batch(shard, batches[number], ends)
            batch |= {
                "shard": index,
                "capacity": len(shard.tokens),
                "last": number == len(batches) - 1,
                "wanted": wanted,
            }
            yield batch

    def _batch(self, shard: TokenShard, rows: Tensor, ends: Tensor) -> dict[str, Any]:
        lengths = shard.lengths[rows].long()
        width, first = int(lengths.max()), ends[rows] - lengths
        real = torch.arange(width) < lengths[:, None]
        # padding is at the end, where a causal model's real tokens do not see it, and takes token 0
        at = torch.where(real, first[:, None] + torch.arange(width), 0)
        input_ids = torch.where(real, shard.tokens[at].long(), 0)
        keep = real & self.token_filter.by_id(input_ids)
        n_read, n_kept = int(real.sum()), int(keep.sum())
        position_ids = None
        if self.mask_documents:
            position_ids = position_ids_of(shard.starts[at] * real)
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "keep": None if n_kept == keep.numel() else keep.flatten().nonzero().flatten(),
            "n_read": n_read,
            "n_special": n_read - n_kept,
        }
