"""Coherence of a dictionary: how close each atom lies to its nearest neighbour, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aen_lightning.diagnostics.quantiles import summarize


@dataclass
class Coherence:
    """Each atom's nearest neighbour.

    Args:
        max_abs_cosine: Largest ``|cosine|`` with another atom, shape (d_sae,), float32.
        neighbour: Which atom that is, shape (d_sae,), int64.
    """

    max_abs_cosine: Tensor
    neighbour: Tensor

    def summary(self, n_pairs: int = 10) -> dict[str, Any]:
        """The section ``coherence`` of the JSON.

        Quantiles, how many atoms have a near twin, and the closest pairs.
        """
        top = self.max_abs_cosine.topk(min(2 * n_pairs, self.max_abs_cosine.numel())).indices.tolist()
        pairs = {
            (min(i, j), max(i, j)): float(self.max_abs_cosine[i])
            for i in top
            for j in [int(self.neighbour[i])]
        }
        return {
            **summarize(self.max_abs_cosine),
            "share_above_0.9": float((self.max_abs_cosine > 0.9).double().mean()),
            "closest_pairs": [
                [i, j, c] for (i, j), c in sorted(pairs.items(), key=lambda p: -p[1])[:n_pairs]
            ],
        }


@torch.no_grad()
def coherence(W_dec: Tensor, *, chunk_size: int = 4096, max_blocks: int | None = None) -> Coherence:
    """Largest ``|cosine|`` of every atom with another one.

    Works through pairs of chunks of atoms, each pair once (the matrix of cosines is symmetric). Beside the
    dictionary it needs two chunks in float32, one block of cosines and its copy: ``4 * chunk_size * (2 * d_in
    + 2 * chunk_size)`` bytes, and 16 bytes per atom. Products are in float32 (float64 for a float64
    dictionary), whatever the dictionary's dtype.

    Args:
        W_dec: Dictionary, shape (d_sae, d_in), any floating dtype. A zero atom has cosine 0 with all.
        chunk_size: Atoms a chunk.
        max_blocks: Stop after so many blocks, with what was found by then; for measuring.

    Raises:
        ValueError: If there are fewer than two atoms.

    Source: the coherence per atom of arXiv:2605.05341, section 6.
    """
    if W_dec.ndim != 2 or len(W_dec) < 2:
        raise ValueError(
            f"coherence needs a dictionary (d_sae, d_in) of at least two atoms, got {tuple(W_dec.shape)}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    dtype = torch.promote_types(W_dec.dtype, torch.float32)
    best = torch.full((len(W_dec),), -1.0, dtype=dtype, device=W_dec.device)
    neighbour = torch.zeros(len(W_dec), dtype=torch.int64, device=W_dec.device)
    starts, done = range(0, len(W_dec), chunk_size), 0
    for i, start in enumerate(starts):
        rows = _unit(W_dec[start : start + chunk_size], dtype)
        for other in starts[i:]:
            if max_blocks is not None and done >= max_blocks:
                return Coherence(best, neighbour)
            columns = rows if other == start else _unit(W_dec[other : other + chunk_size], dtype)
            block = (rows @ columns.T).abs_()
            if other == start:
                block.fill_diagonal_(-1.0)
            _raise_to(best, neighbour, start, *block.max(dim=1), other)
            if other != start:
                _raise_to(best, neighbour, other, *block.max(dim=0), start)
            done += 1
    return Coherence(best, neighbour)


def _unit(rows: Tensor, dtype: torch.dtype) -> Tensor:
    rows = rows.to(dtype, copy=True)
    return rows.div_(rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny))


def _raise_to(best: Tensor, neighbour: Tensor, at: int, values: Tensor, where: Tensor, offset: int) -> None:
    now, near = best[at : at + len(values)], neighbour[at : at + len(values)]
    higher = values > now
    now[higher], near[higher] = values[higher], where[higher] + offset
