"""How far a dictionary trained on synthetic data found the true one.

Its directions, and the supports of its codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aen_lightning.metrics.matching import Matching, match_features
from aen_lightning.metrics.sparsity import ACTIVE_THRESHOLD


def support_scores(feature_acts: Tensor, true_acts: Tensor, matching: Matching) -> dict[str, float]:
    """How well the learned code says which true features are active.

    A learned feature that is active counts as a true positive if its partner is active, else as a false
    positive; one without a partner is always a false positive. Scores are means over samples, where nothing
    predicted and nothing to predict both score 1, and 0 otherwise stands for 0/0.

    Args:
        feature_acts: Learned codes, shape (n, d_sae).
        true_acts: True codes, shape (n, n_features).
        matching: From :func:`~aen_lightning.metrics.match_features`, the learned dictionary first.

    Returns:
        ``precision``, ``recall``, ``f1``, ``jaccard``, ``exact_support_rate`` (share of samples with no error
        at all), and ``l0`` and ``true_l0``, the mean sizes.
    """
    active, true = feature_acts.abs() > ACTIVE_THRESHOLD, true_acts.abs() > ACTIVE_THRESHOLD
    predicted = torch.zeros_like(true)
    predicted[:, matching.second.to(true.device)] = active[:, matching.first.to(active.device)]
    hits = (predicted & true).sum(dim=-1).double()
    n_predicted, n_true = active.sum(dim=-1).double(), true.sum(dim=-1).double()
    both_empty = (n_predicted + n_true == 0).double()

    def share(part: Tensor, whole: Tensor) -> float:
        return float((part / whole.clamp_min(1) + both_empty).mean())

    return {
        "precision": share(hits, n_predicted),
        "recall": share(hits, n_true),
        "f1": share(2 * hits, n_predicted + n_true),
        "jaccard": share(hits, n_predicted + n_true - hits),
        "exact_support_rate": float(((hits == n_predicted) & (hits == n_true)).double().mean()),
        "l0": float(n_predicted.mean()),
        "true_l0": float(n_true.mean()),
    }


def ground_truth_scores(
    W_dec: Tensor, feature_vectors: Tensor, feature_acts: Tensor, true_acts: Tensor
) -> dict[str, Any]:
    """All measures against the ground truth: the section ``ground_truth`` of ``aen evaluate``'s JSON.

    Args:
        W_dec: Learned dictionary, shape (d_sae, d_in).
        feature_vectors: True dictionary, shape (n_features, d_in).
        feature_acts: Learned codes of some samples, shape (n, d_sae).
        true_acts: Their true codes, shape (n, n_features).

    Returns:
        ``matched_cosine`` (mean over the pairs of the best assignment, as
        ``aen_lightning.metrics.matched_cosine``), ``found_at_0.9`` (share of true features whose partner has
        a cosine of 0.9 or more), ``support`` (see :func:`support_scores`).

    Source: arXiv:2605.05341, section 6.
    """
    matching = match_features(W_dec, feature_vectors)
    return {
        "matched_cosine": float(matching.cosine.mean()),
        "found_at_0.9": float((matching.cosine >= 0.9).sum() / len(feature_vectors)),
        "support": support_scores(feature_acts, true_acts, matching),
    }
