"""Whether a feature is found again: dictionaries of several seeds, runs or releases, matched by cosine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from aen_lightning.diagnostics.quantiles import summarize
from aen_lightning.metrics import Matching, match_features
from aen_lightning.metrics.matching import unit_rows
from aen_lightning.progress import counted


def compare_dictionaries(
    dictionaries: Mapping[str, Tensor],
    *,
    live: Mapping[str, Tensor] | None = None,
    thresholds: Sequence[float] = (0.7, 0.9),
    baseline: bool = True,
    **matching_options: int,
) -> dict[str, Any]:
    """Match every two of several dictionaries, and count the features found again.

    Args:
        dictionaries: By name, each (n_features, d_in), at least two.
        live: By name, bool (n_features,): features that fire. Where all dictionaries have it, dead features
            are left out of everything, as their directions are left over from the start of training.
        thresholds: Cosines at which a pair counts as the same feature.
        baseline: Match each dictionary with random directions, too: what cosine chance gives at these sizes.
        **matching_options: ``n_neighbours`` and ``dense_limit`` of
            :func:`aen_lightning.metrics.match_features`.

    Returns:
        The JSON of ``aen compare`` but for its head: ``n_features`` and ``n_compared`` by name; ``pairs``, a
        list of ``{"a", "b", "exact", "n_pairs", "cosine" (mean and quantiles over pairs), "found_again":
        {threshold: {"of_a", "of_b"}}, "unstable": ...}``, shares of each dictionary's compared features, and
        what :func:`shared_subspace` says of those not found again at the lowest threshold; ``found_in_all``: by
        name and threshold the share of its features that have a partner in every other dictionary;
        ``random_baseline``: by name ``cosine`` and ``found_again`` against as many random directions.

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
    again = {name: {t: torch.ones(len(W), dtype=torch.bool) for t in thresholds} for name, W in atoms.items()}
    pairs = []
    for a, b in counted(
        combinations(atoms, 2), "matching features", len(atoms) * (len(atoms) - 1) // 2, "pairs"
    ):
        matching = match_features(atoms[a], atoms[b], **matching_options)
        pairs.append(
            {
                "a": a,
                "b": b,
                "exact": matching.exact,
                "n_pairs": len(matching.cosine),
                "cosine": summarize(matching.cosine),
                "found_again": _found_again(matching, len(atoms[a]), len(atoms[b]), thresholds),
                "unstable": _unstable(matching, atoms[a], atoms[b], min(thresholds)),
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
        "found_in_all": {
            n: {str(t): float(m.double().mean()) for t, m in by.items()} for n, by in again.items()
        },
    }
    if baseline:
        found["random_baseline"] = {
            name: _random_baseline(W, thresholds, **matching_options) for name, W in atoms.items()
        }  # fmt: skip
    return found


def _unstable(matching: Matching, W_a: Tensor, W_b: Tensor, threshold: float) -> dict[str, Any] | None:
    again = matching.cosine >= threshold
    left = []
    for W, index in ((W_a, matching.first), (W_b, matching.second)):
        mask = torch.ones(len(W), dtype=torch.bool)
        mask[index[again]] = False
        left.append(W[mask.to(W.device)])
    if not all(map(len, left)):
        return None
    return {"threshold": threshold, **shared_subspace(*left)}


def shared_subspace(W_a: Tensor, W_b: Tensor, *, energy: float = 0.9) -> dict[str, Any]:
    """Whether two sets of directions, none of which is found in the other, still fill the same subspace.

    Args:
        W_a: Shape (n_a, d_in).
        W_b: Shape (n_b, d_in).
        energy: Share of a set's squared norm that its subspace must hold.

    Returns:
        ``n_a``, ``n_b``; ``rank_a``, ``rank_b``: dimensions of the smallest subspace that holds ``energy`` of
        the set's unit directions; ``a_in_b``: share of the squared norm of a's unit directions inside b's
        subspace, and ``b_in_a``; ``a_in_b_by_chance`` and ``b_in_a_by_chance``: the same for directions that
        know nothing of it, rank / d_in.

    Source: that features which differ between seeds share a reproducible subspace is reported in
        arXiv:2606.12138.
    """
    d_in = W_a.shape[1]
    grams = [unit.T @ unit for unit in (unit_rows(W).double() for W in (W_a, W_b))]
    found: dict[str, Any] = {"n_a": len(W_a), "n_b": len(W_b)}
    bases = {}
    for name, gram in zip("ab", grams, strict=True):
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        rank = int((values.cumsum(0) < energy * values.sum() * (1 - 1e-12)).sum()) + 1
        found[f"rank_{name}"], bases[name] = rank, vectors[:, :rank]
    for name, other, gram in (("a", "b", grams[0]), ("b", "a", grams[1])):
        basis = bases[other]
        held = (basis * (gram @ basis)).sum() / gram.trace().clamp_min(1e-300)
        found[f"{name}_in_{other}"] = float(held)
        found[f"{name}_in_{other}_by_chance"] = basis.shape[1] / d_in
    return found


def _found_again(
    matching: Matching, n_a: int, n_b: int, thresholds: Sequence[float]
) -> dict[str, dict[str, float]]:
    counts = {t: int((matching.cosine >= t).sum()) for t in thresholds}
    return {str(t): {"of_a": n / n_a, "of_b": n / n_b} for t, n in counts.items()}


def _random_baseline(W: Tensor, thresholds: Sequence[float], **matching_options: int) -> dict[str, Any]:
    # no small number: a synthetic dictionary made from the same seed would be found again
    generator = torch.Generator().manual_seed(0x5EED_BA5E)
    random = torch.randn(W.shape, generator=generator).to(W.device)
    matching = match_features(W, random, **matching_options)
    shares = _found_again(matching, len(W), len(W), thresholds)
    return {"cosine": summarize(matching.cosine), "found_again": {t: s["of_a"] for t, s in shares.items()}}
