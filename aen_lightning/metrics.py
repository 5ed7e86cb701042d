"""Metrics of a sparse autoencoder as torchmetrics classes, and measures against a known dictionary.

Every metric keeps sums, so that ranks and batches reduce exactly: the value is that of one pass over all tokens. Definitions:
arXiv:2605.05341, section 6, as written out with each class. Sums are replaced, not added to in place: Lightning validates and resets in
inference mode, and what was made there may not be changed in place in the fit that follows.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric

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


class ExplainedVariance(Metric):
    """``1 - sum_i var(x - x_hat)_i / sum_i var(x)_i``, variances over tokens, dimensionless (1 is perfect).

    A constant offset between ``x`` and ``x_hat`` costs nothing here, unlike in SAELens's variant, which takes the squared error in
    the numerator.

    Args:
        d_in: Width of the activations.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    error_sum: Tensor
    error_square_sum: Tensor
    sum: Tensor
    square_sum: Tensor
    n_tokens: Tensor

    def __init__(self, d_in: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # float64: the variance is a difference of two large sums
        for name in ("error_sum", "sum"):
            self.add_state(name, torch.zeros(d_in, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("error_square_sum", "square_sum"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add inputs and reconstructions of shape (..., d_in)."""
        x = x.flatten(end_dim=-2).double()
        error = x - x_hat.flatten(end_dim=-2).double()
        self.error_sum = self.error_sum + error.sum(dim=0)
        self.error_square_sum = self.error_square_sum + error.square().sum()
        self.sum = self.sum + x.sum(dim=0)
        self.square_sum = self.square_sum + x.square().sum()
        self.n_tokens = self.n_tokens + x.shape[0]

    def compute(self) -> Tensor:
        """The share of variance explained, over all tokens seen."""
        error_variance = self.error_square_sum - self.error_sum.square().sum() / self.n_tokens
        variance = self.square_sum - self.sum.square().sum() / self.n_tokens
        return (1 - error_variance / variance).float()


class MSE(Metric):
    """Mean over tokens and dimensions of ``(x - x_hat)^2``, in squared activation units (the paper's form: no sum over ``d_in``)."""

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    square_sum: Tensor
    n_values: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("square_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_values", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add inputs and reconstructions of shape (..., d_in)."""
        self.square_sum = self.square_sum + (x.double() - x_hat.double()).square().sum()
        self.n_values = self.n_values + x.numel()

    def compute(self) -> Tensor:
        """The mean squared error over everything seen."""
        return (self.square_sum / self.n_values).float()


class ShrinkageRatio(Metric):
    """``||x_hat||_1 / ||x||_1`` summed over tokens, dimensionless; below 1 the reconstruction is too small."""

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    reconstruction: Tensor
    original: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("reconstruction", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("original", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add inputs and reconstructions of shape (..., d_in)."""
        self.reconstruction = self.reconstruction + x_hat.double().abs().sum()
        self.original = self.original + x.double().abs().sum()

    def compute(self) -> Tensor:
        """The ratio over everything seen."""
        return (self.reconstruction / self.original).float()


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


def matched_cosine(W_dec: Tensor, feature_vectors: Tensor) -> float:
    """Mean cosine between the true features and the decoder rows that the best one-to-one assignment gives them.

    Args:
        W_dec: Learned dictionary, shape (d_sae, d_in).
        feature_vectors: True dictionary, shape (n_features, d_in).

    Returns:
        The mean over ``min(d_sae, n_features)`` pairs, in [-1, 1]; 1 means every feature was found. A zero row has cosine 0.

    Source: the matched cosine (MCC) of arXiv:2605.05341, section 6; assignment by :func:`scipy.optimize.linear_sum_assignment`.
    """
    if W_dec.ndim != 2 or feature_vectors.ndim != 2 or W_dec.shape[1] != feature_vectors.shape[1]:
        raise ValueError(
            "matched_cosine needs two dictionaries of the same width, (d_sae, d_in) and (n_features, d_in); "
            f"got {tuple(W_dec.shape)} and {tuple(feature_vectors.shape)}"
        )
    learned = torch.nn.functional.normalize(W_dec.detach().double(), dim=-1)
    true = torch.nn.functional.normalize(feature_vectors.detach().double(), dim=-1)
    cosine = (learned @ true.T).cpu().numpy()
    rows, columns = linear_sum_assignment(cosine, maximize=True)
    return float(cosine[rows, columns].mean())
