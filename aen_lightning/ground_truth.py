"""How far a dictionary trained on synthetic data found the true one: its directions, and the supports of its codes."""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from aen_lightning.metrics import ACTIVE_THRESHOLD


def match_features(W_dec: Tensor, feature_vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The best one-to-one assignment of learned to true features by cosine (Hungarian method).

    Args:
        W_dec: Learned dictionary, shape (d_sae, d_in).
        feature_vectors: True dictionary, shape (n_features, d_in).

    Returns:
        ``partner``, shape (d_sae,), int64: the true feature of each learned one, -1 for those left over; and ``cosine``,
        shape (d_sae,), float64, of each pair, nan for those left over.

    Raises:
        ValueError: If the widths differ.
    """
    if W_dec.ndim != 2 or feature_vectors.ndim != 2 or W_dec.shape[1] != feature_vectors.shape[1]:
        raise ValueError(
            "two dictionaries of the same width are needed, (d_sae, d_in) and (n_features, d_in); "
            f"got {tuple(W_dec.shape)} and {tuple(feature_vectors.shape)}"
        )
    learned = torch.nn.functional.normalize(W_dec.detach().cpu().double(), dim=-1)
    true = torch.nn.functional.normalize(feature_vectors.detach().cpu().double(), dim=-1)
    cosines = learned @ true.T
    rows, columns = (torch.from_numpy(i).long() for i in linear_sum_assignment(cosines.numpy(), maximize=True))
    partner = torch.full((len(learned),), -1)
    cosine = torch.full((len(learned),), torch.nan, dtype=torch.float64)
    partner[rows], cosine[rows] = columns, cosines[rows, columns]
    return partner, cosine


def support_scores(feature_acts: Tensor, true_acts: Tensor, partner: Tensor) -> dict[str, float]:
    """How well the learned code says which true features are active.

    A learned feature that is active counts as a true positive if its partner is active, else as a false positive; one
    without a partner is always a false positive. Scores are means over samples, where nothing predicted and nothing to
    predict both score 1, and 0 otherwise stands for 0/0.

    Args:
        feature_acts: Learned codes, shape (n, d_sae).
        true_acts: True codes, shape (n, n_features).
        partner: From :func:`match_features`.

    Returns:
        ``precision``, ``recall``, ``f1``, ``jaccard``, ``exact_support_rate`` (share of samples with no error at all), and
        ``l0`` and ``true_l0``, the mean sizes.
    """
    active, true = feature_acts.abs() > ACTIVE_THRESHOLD, true_acts.abs() > ACTIVE_THRESHOLD
    partner = partner.to(active.device)
    paired = partner >= 0
    predicted = torch.zeros_like(true)
    predicted[:, partner[paired]] = active[:, paired]
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
        ``matched_cosine`` (mean over the pairs of the best assignment, as ``aen_lightning.metrics.matched_cosine``),
        ``found_at_0.9`` (share of true features whose partner has a cosine of 0.9 or more), ``support`` (see
        :func:`support_scores`).

    Source: arXiv:2605.05341, section 6.
    """
    partner, cosine = match_features(W_dec, feature_vectors)
    pairs = cosine[partner >= 0]
    return {
        "matched_cosine": float(pairs.mean()),
        "found_at_0.9": float((pairs >= 0.9).sum() / len(feature_vectors)),
        "support": support_scores(feature_acts, true_acts, partner),
    }
