"""Whether a feature is found again: dictionaries of several seeds, runs or releases, matched by cosine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from aen_lightning.diagnostics.quantiles import summarize
from aen_lightning.metrics import Matching, match_features
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
        {threshold: {"of_a", "of_b"}}}``, shares of each dictionary's compared features; ``found_in_all``: by
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
