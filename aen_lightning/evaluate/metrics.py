"""Metrics beyond those of training, as torchmetrics classes on sums, and standard errors by the jackknife."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from aen_lightning.metrics import ACTIVE_THRESHOLD, L0, MSE, ExplainedVariance, ShrinkageRatio

Estimate = dict[str, float | None]
"""``value`` and ``se``, its standard error (None where it cannot be told)."""


class _TokenMean(Metric):
    """Mean over tokens of a number per token."""

    full_state_update = False
    is_differentiable = False
    total: Tensor
    n_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_tokens", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, per_token: Tensor) -> None:
        self.total = self.total + per_token.double().sum()
        self.n_tokens = self.n_tokens + per_token.numel()

    def compute(self) -> Tensor:
        """The mean over tokens."""
        return self.total / self.n_tokens


class L1(_TokenMean):
    """Mean over tokens of ``sum_j |h_j|``, in activation units, as SAELens's ``l1``."""

    def update(self, feature_acts: Tensor) -> None:
        """Add activations of shape (..., d_sae)."""
        self._add(feature_acts.abs().sum(dim=-1))


class Cosine(_TokenMean):
    """Mean over tokens of the cosine between ``x`` and ``x_hat``, as SAELens's ``cossim``; 0 where one of them is zero."""

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add inputs and reconstructions of shape (..., d_in)."""
        self._add(torch.nn.functional.cosine_similarity(x.double(), x_hat.double(), dim=-1))


class L2Ratio(_TokenMean):
    """Mean over tokens of ``||x_hat|| / ||x||``, as SAELens's ``l2_ratio``."""

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add inputs and reconstructions of shape (..., d_in)."""
        self._add(x_hat.double().norm(dim=-1) / x.double().norm(dim=-1).clamp_min(1e-12))


class SquaredError(_TokenMean):
    """Mean over tokens of ``||x - x_hat||^2``, summed over ``d_in``: what SAELens calls ``mse``."""

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add inputs and reconstructions of shape (..., d_in)."""
        self._add((x.double() - x_hat.double()).square().sum(dim=-1))


class R2(ExplainedVariance):
    """``1 - mean ||x - x_hat||^2 / sum_i var(x)_i``: SAELens's ``explained_variance``, where a constant offset counts as error."""

    def compute(self) -> Tensor:
        """R squared over all tokens seen."""
        variance = self.square_sum - self.sum.square().sum() / self.n_tokens
        return (1 - self.error_square_sum / variance).float()


class RelativeReconstructionBias(Metric):
    """``mean ||x_hat||^2 / mean x . x_hat`` (equation 10 of arXiv:2404.16014); below 1 the reconstruction is too small."""

    full_state_update = False
    is_differentiable = False
    norms: Tensor
    products: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("norms", "products"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add inputs and reconstructions of shape (..., d_in)."""
        self.norms = self.norms + x_hat.double().square().sum()
        self.products = self.products + (x.double() * x_hat.double()).sum()

    def compute(self) -> Tensor:
        """The ratio over everything seen."""
        return self.norms / self.products


class FeatureUse(Metric):
    """How often each feature fires and how strongly: firing counts, summed activations, and what follows from them.

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
        """``density`` (firings per token) and ``mean_when_active`` (0 for features that never fired), each (d_sae,)."""
        return {
            "density": self.n_firings.double() / self.n_tokens,
            "mean_when_active": self.acts_sum / self.n_firings.clamp_min(1),
        }


def utilisation(density: Tensor) -> dict[str, float]:
    """How evenly the features share the work.

    Args:
        density: Firing rate per feature, shape (d_sae,), ``>= 0``.

    Returns:
        ``gini``: Gini coefficient of the rates, 0 if all are equal, ``1 - 1/d_sae`` if one feature does everything;
        ``normalized_entropy``: entropy of the rates as a distribution over features, divided by ``log d_sae``;
        ``top_1pct_mass`` and ``top_10pct_mass``: share of all firings that fall to the most frequent 1 % and 10 % of features
        (at least one). All nan if nothing fired.

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
        ``log10_edges`` (n + 1 numbers, from ``low`` to 0), ``counts`` (n numbers; rarer features are in the first bin), ``n_never``.
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


def reconstruction_metrics(d_in: int) -> dict[str, Metric]:
    """The metrics on (x, x_hat), by name; see the JSON layout in :mod:`aen_lightning.evaluate`."""
    return {
        "explained_variance": ExplainedVariance(d_in),
        "r2": R2(d_in),
        "mse": MSE(),
        "squared_error": SquaredError(),
        "cosine": Cosine(),
        "shrinkage_ratio": ShrinkageRatio(),
        "l2_ratio": L2Ratio(),
        "relative_reconstruction_bias": RelativeReconstructionBias(),
    }


def sparsity_metrics() -> dict[str, Metric]:
    """The metrics on feature activations that have a standard error."""
    return {"l0": L0(), "l1": L1()}


def jackknife(sums: Tensor, statistic: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A statistic of sums over groups, and its standard errors by leaving out one group at a time.

    Args:
        sums: Shape (groups, ...): what each group adds to the sums.
        statistic: From the sums over all groups, shape (...), to any tensor.

    Returns:
        The statistic, and its standard error of the same shape; nan with fewer than two groups. Groups must be about
        equally large and close to independent: here they are runs of whole context rows.

    Source: the delete-a-group jackknife; Efron & Stein (1981), Ann. Stat. 9(3).
    """
    total = sums.sum(dim=0)
    value, n = statistic(total), len(sums)
    if n < 2:
        return value, torch.full_like(value, torch.nan)
    left_out = torch.stack([statistic(total - group) for group in sums])
    return value, ((n - 1) / n * (left_out - left_out.mean(dim=0)).square().sum(dim=0)).sqrt()


def jackknife_metric(groups: Sequence[Metric]) -> Estimate:
    """Value and standard error of a metric whose states are sums, given one copy of it per group of tokens."""
    filled = [m for m in groups if m.update_called]
    if not filled:
        return {"value": None, "se": None}
    names = list(filled[0]._defaults)
    states = {name: torch.stack([getattr(m, name) for m in filled]) for name in names}
    probe = copy.deepcopy(filled[0])

    def at(state: dict[str, Tensor]) -> Tensor:
        for name, tensor in state.items():
            setattr(probe, name, tensor)
        probe._computed = None
        return probe.compute().double()

    totals = {name: tensor.sum(dim=0) for name, tensor in states.items()}
    value, n = at(totals), len(filled)
    if n < 2:
        return estimate(value, None)
    left_out = torch.stack([at({k: totals[k] - states[k][g] for k in names}) for g in range(n)])
    return estimate(value, ((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt())


def estimate(value: Tensor, se: Tensor | None) -> Estimate:
    """``{"value", "se"}`` of plain numbers; None for what is not finite."""
    return {"value": finite(value), "se": None if se is None else finite(se)}


def finite(value: Tensor | float) -> float | None:
    """A plain number that JSON can hold, None for nan and infinity."""
    number = float(value)
    return number if torch.isfinite(torch.tensor(number)) else None
