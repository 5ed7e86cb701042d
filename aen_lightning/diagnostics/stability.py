"""Whether a feature is found again: dictionaries of several seeds, runs or releases, matched by cosine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from aen_lightning.diagnostics.gram import unit_atoms
from aen_lightning.diagnostics.quantiles import summarize

_DENSE_LIMIT = 2**27  # elements of a matrix of cosines that the exact assignment is given: 1 GiB in float64


@dataclass
class Matching:
    """A one-to-one assignment of the features of two dictionaries.

    Args:
        first: Features of the first dictionary, shape (n,), ascending.
        second: Their partners in the second, shape (n,).
        cosine: Of each pair, shape (n,), float64.
        exact: Whether it is the best assignment of all, or the best among each feature's nearest neighbours.
    """

    first: Tensor
    second: Tensor
    cosine: Tensor
    exact: bool


def match_dictionaries(
    W_a: Tensor, W_b: Tensor, *, n_neighbours: int = 32, dense_limit: int = _DENSE_LIMIT, chunk_size: int = 4096
) -> Matching:
    """Assign features of one dictionary to those of another so that the sum of their cosines is largest.

    Signs count: a feature is a direction, not a line. Up to ``dense_limit`` cosines the assignment is exact (Hungarian method);
    beyond, each feature of the first may take one of its ``n_neighbours`` nearest in the second, or stay alone (cosine 0), and
    the best assignment under that is found, in memory that grows with ``n_neighbours`` only.

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
            f"dictionaries to compare need one width: got (features, d_in) {tuple(W_a.shape)} and {tuple(W_b.shape)}"
        )
    a, b = unit_atoms(W_a), unit_atoms(W_b)
    if len(a) * len(b) <= dense_limit:
        cosines = (a @ b.T).double().cpu().numpy()
        rows, columns = linear_sum_assignment(cosines, maximize=True)
        return _matching(rows, columns, cosines[rows, columns], exact=True)
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


def _sparse_matching(cosines: np.ndarray[Any, Any], columns: np.ndarray[Any, Any], n_b: int) -> Matching:
    n_a, k = cosines.shape
    # a column of its own for each row, at cosine 0: staying alone; costs are kept off zero, which a sparse matrix drops
    cost = np.concatenate([2.0 - cosines.clip(min=0), np.full((n_a, 1), 2.0)], axis=1)
    column = np.concatenate([columns, n_b + np.arange(n_a)[:, None]], axis=1)
    graph = csr_array((cost.ravel(), column.ravel(), np.arange(0, n_a * (k + 1) + 1, k + 1)), shape=(n_a, n_b + n_a))
    rows, chosen = min_weight_full_bipartite_matching(graph)
    paired = chosen < n_b
    rows, chosen = rows[paired], chosen[paired]
    at = (columns[rows] == chosen[:, None]).argmax(axis=1)
    return _matching(rows, chosen, cosines[rows, at], exact=False)


def _matching(
    rows: np.ndarray[Any, Any], columns: np.ndarray[Any, Any], cosines: np.ndarray[Any, Any], *, exact: bool
) -> Matching:
    order = np.argsort(rows)
    first, second, cosine = (torch.from_numpy(np.ascontiguousarray(v[order])) for v in (rows, columns, cosines))
    return Matching(first.long(), second.long(), cosine.double(), exact)


def compare_dictionaries(
    dictionaries: Mapping[str, Tensor],
    *,
    live: Mapping[str, Tensor] | None = None,
    thresholds: Sequence[float] = (0.7, 0.9),
    baseline: bool = True,
    n_neighbours: int = 32,
    dense_limit: int = _DENSE_LIMIT,
) -> dict[str, Any]:
    """Match every two of several dictionaries, and count the features found again.

    Args:
        dictionaries: By name, each (n_features, d_in), at least two.
        live: By name, bool (n_features,): features that fire. Where all dictionaries have it, dead features are left out of everything,
            as their directions are left over from the start of training.
        thresholds: Cosines at which a pair counts as the same feature.
        baseline: Match each dictionary with random directions, too: what cosine chance gives at these sizes.
        n_neighbours: See :func:`match_dictionaries`.
        dense_limit: See :func:`match_dictionaries`.

    Returns:
        The JSON of ``aen compare`` but for its head: ``n_features`` and ``n_compared`` by name; ``pairs``, a list of ``{"a", "b", "exact",
        "n_pairs", "cosine" (mean and quantiles over pairs), "found_again": {threshold: {"of_a", "of_b"}}}``, shares of each
        dictionary's compared features; ``found_in_all``: by name and threshold the share of its features that have a partner in every other
        dictionary; ``random_baseline``: by name ``cosine`` and ``found_again`` against as many random directions.

    Raises:
        ValueError: For fewer than two dictionaries, or widths that differ.
    """
    if len(dictionaries) < 2:
        raise ValueError(f"compare needs at least two dictionaries, got {len(dictionaries)}")
    use_live = live is not None and all(name in live for name in dictionaries)
    atoms: dict[str, Tensor] = {}
    for name, W in dictionaries.items():
        atoms[name] = W[live[name].to(W.device)] if use_live and live is not None else W
        if len(atoms[name]) == 0:
            raise ValueError(f"{name} has no live feature to compare")
    options = {"n_neighbours": n_neighbours, "dense_limit": dense_limit}
    again = {name: {t: torch.ones(len(W), dtype=torch.bool) for t in thresholds} for name, W in atoms.items()}
    pairs = []
    for a, b in combinations(atoms, 2):
        matching = match_dictionaries(atoms[a], atoms[b], **options)
        pairs.append(
            {
                "a": a,
                "b": b,
                "exact": matching.exact,
                "n_pairs": len(matching.cosine),
                "cosine": summarize(matching.cosine),
                "found_again": _found_again(matching, len(atoms[a]), len(atoms[b]), thresholds),
            }
        )
        for name, index in ((a, matching.first), (b, matching.second)):
            for t in thresholds:
                here = torch.zeros(len(atoms[name]), dtype=torch.bool)
                here[index[matching.cosine >= t]] = True
                again[name][t] &= here
    found: dict[str, Any] = {
        "n_features": {name: len(W) for name, W in dictionaries.items()},
        "n_compared": {name: len(W) for name, W in atoms.items()},
        "dead_features_left_out": use_live,
        "pairs": pairs,
        "found_in_all": {n: {str(t): float(m.double().mean()) for t, m in by.items()} for n, by in again.items()},
    }
    if baseline:
        found["random_baseline"] = {
            name: _random_baseline(W, thresholds, **options) for name, W in atoms.items()
        }  # fmt: skip
    return found


def _found_again(matching: Matching, n_a: int, n_b: int, thresholds: Sequence[float]) -> dict[str, dict[str, float]]:
    counts = {t: int((matching.cosine >= t).sum()) for t in thresholds}
    return {str(t): {"of_a": n / n_a, "of_b": n / n_b} for t, n in counts.items()}


def _random_baseline(W: Tensor, thresholds: Sequence[float], **options: int) -> dict[str, Any]:
    # no small number: a synthetic dictionary made from the same seed would be found again
    generator = torch.Generator().manual_seed(0x5EED_BA5E)
    random = torch.randn(W.shape, generator=generator).to(W.device)
    matching = match_dictionaries(W, random, **options)
    shares = _found_again(matching, len(W), len(W), thresholds)
    return {"cosine": summarize(matching.cosine), "found_again": {t: s["of_a"] for t, s in shares.items()}}
