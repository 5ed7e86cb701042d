"""The best one-to-one assignment of the features of two dictionaries, by cosine (the Hungarian method)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

_DENSE_LIMIT = 2**27  # elements of a matrix of cosines that the exact assignment is given: 1 GiB in float64


@dataclass
class Matching:
    """A one-to-one assignment of the features of two dictionaries.

    Args:
        first: Features of the first dictionary, shape (n,), int64, ascending.
        second: Their partners in the second, shape (n,), int64.
        cosine: Of each pair, shape (n,), float64.
        exact: Whether it is the best assignment of all, or the best among each feature's nearest neighbours.
    """

    first: Tensor
    second: Tensor
    cosine: Tensor
    exact: bool


def unit_rows(W_dec: Tensor, *, dtype: torch.dtype | None = None, chunk_size: int = 8192) -> Tensor:
    """The dictionary with rows of norm 1; zero rows stay zero.

    Args:
        W_dec: Shape (d_sae, d_in).
        dtype: Of the result; None: that of ``W_dec``, but at least float32.
        chunk_size: Rows a chunk.
    """
    dtype = torch.promote_types(W_dec.dtype, torch.float32) if dtype is None else dtype
    out = torch.empty(W_dec.shape, dtype=dtype, device=W_dec.device)
    for start in range(0, len(W_dec), chunk_size):
        rows = W_dec[start : start + chunk_size].detach().to(dtype)
        out[start : start + chunk_size] = rows / rows.norm(dim=-1, keepdim=True).clamp_min(
            torch.finfo(dtype).tiny
        )
    return out


def match_features(
    W_a: Tensor,
    W_b: Tensor,
    *,
    n_neighbours: int = 32,
    dense_limit: int = _DENSE_LIMIT,
    chunk_size: int = 4096,
) -> Matching:
    """Assign features of one dictionary to those of another so that the sum of their cosines is largest.

    Signs count: a feature is a direction, not a line. Up to ``dense_limit`` cosines the assignment is exact,
    in float64; beyond, each feature of the first may take one of its ``n_neighbours`` nearest in the second,
    or stay alone (cosine 0), and the best assignment under that is found, in memory that grows with
    ``n_neighbours`` only.

    Args:
        W_a: Shape (n_a, d_in).
        W_b: Shape (n_b, d_in).
        n_neighbours: Candidates a feature, for large dictionaries.
        dense_limit: ``n_a * n_b`` up to which the assignment is exact.
        chunk_size: Features a chunk.

    Raises:
        ValueError: If the widths differ.
    """
    if W_a.ndim != 2 or W_b.ndim != 2 or W_a.shape[1] != W_b.shape[1]:
        raise ValueError(
            f"two dictionaries of the same width are needed, (n_a, d_in) and (n_b, d_in); "
            f"got {tuple(W_a.shape)} and {tuple(W_b.shape)}"
        )
    if len(W_a) * len(W_b) <= dense_limit:
        cosines = (unit_rows(W_a, dtype=torch.float64) @ unit_rows(W_b, dtype=torch.float64).T).cpu().numpy()
        rows, columns = linear_sum_assignment(cosines, maximize=True)
        return _matching(rows, columns, cosines[rows, columns], exact=True)
    a, b = unit_rows(W_a), unit_rows(W_b)
    k = min(n_neighbours, len(b))
    values, indices = [], []
    for start in range(0, len(a), chunk_size):
        best = torch.full((min(chunk_size, len(a) - start), 0), 0.0, device=a.device)
        where = torch.zeros(best.shape, dtype=torch.int64, device=a.device)
        for other in range(0, len(b), chunk_size):
            block = a[start : start + chunk_size] @ b[other : other + chunk_size].T
            near = block.topk(min(k, block.shape[1]), dim=-1)
            best = torch.cat([best, near.values], dim=1)
            where = torch.cat([where, near.indices + other], dim=1)
            top = best.topk(min(k, best.shape[1]), dim=-1)
            best, where = top.values, where.gather(1, top.indices)
        values.append(best.cpu())
        indices.append(where.cpu())
    return _sparse_matching(torch.cat(values).double().numpy(), torch.cat(indices).numpy(), len(b))


def matched_cosine(W_dec: Tensor, feature_vectors: Tensor) -> float:
    """Mean cosine between the true features and the decoder rows that the best one-to-one assignment gives
    them.

    Args:
        W_dec: Learned dictionary, shape (d_sae, d_in).
        feature_vectors: True dictionary, shape (n_features, d_in).

    Returns:
        The mean over ``min(d_sae, n_features)`` pairs, in [-1, 1]; 1 means every feature was found. A zero
        row has cosine 0.

    Source: the matched cosine (MCC) of arXiv:2605.05341, section 6.
    """
    return float(match_features(W_dec, feature_vectors).cosine.mean())


def _sparse_matching(cosines: np.ndarray[Any, Any], columns: np.ndarray[Any, Any], n_b: int) -> Matching:
    n_a, k = cosines.shape
    # a column of its own for each row, at cosine 0: staying alone; costs are kept off zero, which a sparse
    # matrix drops
    cost = np.concatenate([2.0 - cosines.clip(min=0), np.full((n_a, 1), 2.0)], axis=1)
    column = np.concatenate([columns, n_b + np.arange(n_a)[:, None]], axis=1)
    graph = csr_array(
        (cost.ravel(), column.ravel(), np.arange(0, n_a * (k + 1) + 1, k + 1)), shape=(n_a, n_b + n_a)
    )
    rows, chosen = min_weight_full_bipartite_matching(graph)
    paired = chosen < n_b
    rows, chosen = rows[paired], chosen[paired]
    at = (columns[rows] == chosen[:, None]).argmax(axis=1)
    return _matching(rows, chosen, cosines[rows, at], exact=False)


def _matching(
    rows: np.ndarray[Any, Any], columns: np.ndarray[Any, Any], cosines: np.ndarray[Any, Any], *, exact: bool
) -> Matching:
    order = np.argsort(rows)
    first, second, cosine = (
        torch.from_numpy(np.ascontiguousarray(v[order])) for v in (rows, columns, cosines)
    )
    return Matching(first.long(), second.long(), cosine.double(), exact)
