"""The order in which rows on disk are read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class ShuffledOrder:
    """The endless order in which rows are read: a pure function of its arguments, with nothing to save.

    Each epoch is a permutation of all rows. Blocks of neighbouring rows are permuted over the whole set; then
    rows are permuted within windows of many blocks. A set no larger than a window is thus permuted uniformly;
    a larger one is read from disk block by block, and two neighbours share a batch of B rows with probability
    about ``B / window_rows``.

    Args:
        n_rows: Rows in the set.
        seed: Another seed, another order.
        block_rows: Neighbouring rows that stay in one window.
        window_rows: Rows permuted together; rounded down to whole blocks.
    """

    def __init__(self, n_rows: int, *, seed: int, block_rows: int = 64, window_rows: int = 1 << 20) -> None:
        for name, value in (("n_rows", n_rows), ("block_rows", block_rows), ("window_rows", window_rows)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.n_rows, self.seed, self.block_rows = n_rows, seed, block_rows
        self.n_blocks = -(-n_rows // block_rows)
        self.blocks_per_window = max(1, window_rows // block_rows)
        self._blocks: tuple[int, NDArray[np.int64], int] | None = None
        self._window: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def rows(self, position: int, count: int) -> NDArray[np.int64]:
        """Row numbers at positions ``position`` to ``position + count`` of the endless order."""
        pieces = []
        while count > 0:
            epoch, within = divmod(position, self.n_rows)
            window, start = self._locate(epoch, within)
            rows = self._window_rows(epoch, window)[within - start :][:count]
            pieces.append(rows)
            position, count = position + len(rows), count - len(rows)
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def batch(self, step: int, size: int, *, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
        """Rows of one batch of one rank, ascending: a batch is a set, and reading it in order is cheaper."""
        return np.sort(self.rows((step * world_size + rank) * size, size))

    def _permuted_blocks(self, epoch: int) -> tuple[NDArray[np.int64], int]:
        """An epoch's order of blocks, and the window that the set's last, maybe shorter block went to."""
        if self._blocks is None or self._blocks[0] != epoch:
            blocks = np.random.default_rng([self.seed, epoch]).permutation(self.n_blocks)
            short = int(np.flatnonzero(blocks == self.n_blocks - 1)[0]) // self.blocks_per_window
            self._blocks = (epoch, blocks, short)
        return self._blocks[1:]

    def _locate(self, epoch: int, within: int) -> tuple[int, int]:
        """The window that holds a position of an epoch, and the position at which that window starts."""
        per_window = self.blocks_per_window * self.block_rows
        deficit = self.n_blocks * self.block_rows - self.n_rows  # rows that the last block lacks
        _, short = self._permuted_blocks(epoch)
        if within < (short + 1) * per_window - deficit:
            window = min(within // per_window, short)
            return window, window * per_window
        window = (within + deficit) // per_window
        return window, window * per_window - deficit

    def _window_rows(self, epoch: int, window: int) -> NDArray[np.int64]:
        if self._window is None or self._window[0] != (epoch, window):
            first = window * self.blocks_per_window
            blocks = self._permuted_blocks(epoch)[0][first : first + self.blocks_per_window]
            rows = (blocks[:, None] * self.block_rows + np.arange(self.block_rows)).ravel()
            rows = rows[rows < self.n_rows]
            self._window = (
                (epoch, window),
                np.random.default_rng([self.seed, epoch, window]).permutation(rows),
            )
        return self._window[1]
