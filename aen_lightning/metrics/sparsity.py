"""How many features fire, and which, as torchmetrics classes on sums (see
:mod:`aen_lightning.metrics.reconstruction`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from aen_lightning.metrics.token_mean import TokenMean

ACTIVE_THRESHOLD = 1e-12
"""A feature counts as active above this (paper, section 6)."""


def firing_counts(feature_acts: Tensor) -> Tensor:
    """How often each feature fires, shape (d_sae,), int64.

    Args:
        feature_acts: Shape (..., d_sae), dense, or sparse COO of shape (batch, d_sae), which stays sparse.
    """
    if feature_acts.is_sparse:
        coalesced = feature_acts.coalesce()
        features = coalesced.indices()[-1][coalesced.values() > ACTIVE_THRESHOLD]
        return torch.bincount(features, minlength=feature_acts.shape[-1])
    return (feature_acts > ACTIVE_THRESHOLD).flatten(end_dim=-2).sum(dim=0)


class L0(Metric):
    """Mean number of active features per token (a count), as SAELens's ``metrics/l0``."""

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    n_active: Tensor
    n_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # int64: float32 stops counting at 2**24
        self.add_state("n_active", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("n_tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, feature_acts: Tensor) -> None:
        """Add activations of shape (..., d_sae), dense or sparse COO."""
        self.n_active = self.n_active + firing_counts(feature_acts).sum()
        self.n_tokens = self.n_tokens + feature_acts.shape[:-1].numel()

    def compute(self) -> Tensor:
        """The mean over tokens; nan before the first token."""
        return self.n_active / self.n_tokens


class L1(TokenMean):
    """Mean over tokens of ``sum_j |h_j|``, in activation units, as SAELens's ``l1``."""

    def update(self, feature_acts: Tensor) -> None:
        """Add activations of shape (..., d_sae)."""
        self.add(feature_acts.abs().sum(dim=-1))


class DeadFeatures(Metric):
    """Percentage of features that never fired on the tokens seen (0 to 100).

    The figure depends on how many tokens that is: quote it with ``n_tokens``.

    Args:
        d_sae: Number of features.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    n_firings: Tensor
    n_tokens: Tensor

    def __init__(self, d_sae: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("n_firings", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("n_tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, feature_acts: Tensor) -> None:
        """Add activations of shape (..., d_sae), dense or sparse COO."""
        self.n_firings = self.n_firings + firing_counts(feature_acts)
        self.n_tokens = self.n_tokens + feature_acts.shape[:-1].numel()

    def compute(self) -> Tensor:
        """The percentage of features with no firing."""
        return (self.n_firings == 0).float().mean() * 100


class FeatureUse(Metric):
    """How often each feature fires and how strongly: firing counts, summed activations, and what follows from
    them.

    Args:
        d_sae: Number of features.
    """

    full_state_update = False
    is_differentiable = False
    n_firings: Tensor
    acts_sum: Tensor
    n_tokens: Tensor

    def __init__(self, d_sae: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("n_firings", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("acts_sum", torch.zeros(d_sae, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, feature_acts: Tensor) -> None:
        """Add activations of shape (..., d_sae)."""
        acts = feature_acts.flatten(end_dim=-2)
        self.n_firings = self.n_firings + (acts.abs() > ACTIVE_THRESHOLD).sum(dim=0)
        self.acts_sum = self.acts_sum + acts.abs().sum(dim=0, dtype=torch.float64)
        self.n_tokens = self.n_tokens + acts.shape[0]

    def compute(self) -> dict[str, Tensor]:
        """``density`` (firings per token) and ``mean_when_active`` (0 for features that never fired), each
        (d_sae,).
        """
        return {
            "density": self.n_firings.double() / self.n_tokens,
            "mean_when_active": self.acts_sum / self.n_firings.clamp_min(1),
        }


def sparsity_metrics() -> dict[str, Metric]:
    """The metrics on feature activations that have a standard error."""
    return {"l0": L0(), "l1": L1()}


def utilisation(density: Tensor) -> dict[str, float]:
    """How evenly the features share the work.

    Args:
        density: Firing rate per feature, shape (d_sae,), ``>= 0``.

    Returns:
        ``gini``: Gini coefficient of the rates, 0 if all are equal, ``1 - 1/d_sae`` if one feature does
        everything; ``normalized_entropy``: entropy of the rates as a distribution over features, divided by
        ``log d_sae``; ``top_1pct_mass`` and ``top_10pct_mass``: share of all firings that fall to the most
        frequent 1 % and 10 % of features (at least one). All nan if nothing fired.

    Source: arXiv:2605.05341, section 6 ("utilisation of firing rates").
    """
    rates, n = density.double().sort().values, density.numel()
    total = rates.sum()
    rank = torch.arange(1, n + 1, dtype=torch.float64, device=rates.device)
    share = rates / total
    log_n = torch.log(torch.tensor(float(max(n, 2)), dtype=torch.float64))
    return {
        "gini": float((2 * rank - n - 1) @ rates / (n * total)),
        "normalized_entropy": float(-torch.special.xlogy(share, share).sum() / log_n),
        "top_1pct_mass": float(share[-max(1, n // 100) :].sum()),
        "top_10pct_mass": float(share[-max(1, n // 10) :].sum()),
    }


def density_histogram(density: Tensor, *, low: float = -7.0, step: float = 0.25) -> dict[str, Any]:
    """Histogram of ``log10`` firing rate over the features that fired.

    Returns:
        ``log10_edges`` (n + 1 numbers, from ``low`` to 0), ``counts`` (n numbers; rarer features are in the
        first bin), ``n_never``.
    """
    alive = density[density > 0].double().log10().clamp(low, 0)
    n_bins = round(-low / step)
    edges = [low + i * step for i in range(n_bins + 1)]
    index = ((alive - low) / step).long().clamp(0, n_bins - 1)
    return {
        "log10_edges": edges,
        "counts": torch.bincount(index, minlength=n_bins).tolist(),
        "n_never": int((density == 0).sum()),
    }
