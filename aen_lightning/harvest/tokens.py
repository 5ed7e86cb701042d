"""The work order of a harvest: which tokens go into which shard, decided once and kept on disk until the end.

One file per shard, so that any rank can take any shard, now or after a restart, without tokenising again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from aen_lightning.data.token_rows import TokenRows
from aen_lightning.files import save_tensors

TOKENS_FOLDER = "tokens"
_START = (
    1 << 40
)  # added to the first token of a document on its way through the packing, which moves tokens unseen


@dataclass(frozen=True)
class TokenShard:
    """Rows of tokens whose activations fill one shard.

    Args:
        tokens: (n_tokens,) int32, row after row.
        lengths: (n_rows,) int32, tokens in each row.
        starts: (n_tokens,) uint8, 1 where a document begins.
    """

    tokens: Tensor
    lengths: Tensor
    starts: Tensor


class MarkedTokenRows(TokenRows):
    """``TokenRows`` that knows where documents begin."""

    def marked(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of the dataset, once, in its order.

        Tokens, and 1 where a document begins; the same on every rank.
        """
        for row in self.first():
            starts = row >= _START
            tokens = torch.where(starts, row - _START, row)
            if self.separator_token_id is not None and self.separator_token_id == self.begin_batch_token_id:
                # a separator that is the BOS token belongs to the document it opens
                opens = (tokens[:-1] == self.separator_token_id) & starts[1:]
                starts[:-1] |= opens
                starts[1:] &= ~opens
            yield tokens, starts

    def _tokenize(self, documents: Iterator[Any]) -> Iterator[Tensor]:
        for tokens in super()._tokenize(documents):
            if len(tokens):
                tokens[0] += _START
                yield tokens


def token_shard_path(folder: Path, index: int) -> Path:
    """Where the work order of a shard lies."""
    return folder / TOKENS_FOLDER / f"tokens-{index:05d}.safetensors"


def write_token_shards(
    folder: Path, rows: Iterator[tuple[Tensor, Tensor]], *, rows_per_shard: int, n_tokens: int | None
) -> list[int]:
    """Write the work orders of all shards.

    Args:
        folder: Of the set.
        rows: Tokens and document starts, row by row.
        rows_per_shard: Rows that go into one shard.
        n_tokens: Stop after this many tokens: the last row is cut short. None: at the end of ``rows``.

    Returns:
        The number of rows in each shard.
    """
    (folder / TOKENS_FOLDER).mkdir(exist_ok=True)
    if n_tokens is not None:
        rows = _limited(rows, n_tokens)
    counts: list[int] = []
    while piece := list(islice(rows, rows_per_shard)):
        tensors = {
            "tokens": torch.cat([t for t, _ in piece]).to(torch.int32),
            "lengths": torch.tensor([len(t) for t, _ in piece], dtype=torch.int32),
            "starts": torch.cat([s for _, s in piece]).to(torch.uint8),
        }
        save_tensors(token_shard_path(folder, len(counts)), tensors)
        counts.append(len(piece))
    return counts


def _limited(rows: Iterator[tuple[Tensor, Tensor]], n_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    while n_tokens > 0:
        row = next(rows, None)
        if row is None:
            return
        tokens, starts = (part[:n_tokens] for part in row)
        n_tokens -= len(tokens)
        yield tokens, starts


def read_token_shard(folder: Path, index: int) -> TokenShard:
    """Read the work order of one shard."""
    return TokenShard(**load_file(token_shard_path(folder, index)))


def batches_of(lengths: Tensor, batch_size: int) -> list[Tensor]:
    """Row numbers of each batch: rows of like length together, so that little or nothing is padded."""
    order = torch.sort(lengths, descending=True, stable=True).indices
    return list(order.split(batch_size))


def position_ids_of(starts: Tensor) -> Tensor:
    """Position of each token in its document, (batch, context).

    0 at the row's beginning and wherever a document begins.
    """
    at = torch.arange(starts.shape[1]).expand(starts.shape)
    begins = torch.where(starts.bool(), at, 0).cummax(1).values
    return at - begins
