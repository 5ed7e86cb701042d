"""How well inputs are reconstructed, as torchmetrics classes.

Every metric keeps sums, so that ranks and batches reduce exactly: the value is that of one pass over all
tokens. Definitions: arXiv:2605.05341, section 6, as written out with each class. Sums are replaced, not added
to in place: Lightning validates and resets in inference mode, and what was made there may not be changed in
place in the fit that follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from aen_lightning.metrics.token_mean import TokenMean


class ExplainedVariance(Metric):
    """``1 - sum_i var(x - x_hat)_i / sum_i var(x)_i``, variances over tokens, dimensionless (1 is perfect).

    A constant offset between ``x`` and ``x_hat`` costs nothing here, unlike in SAELens's variant, which takes
    the squared error in the numerator.

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


class R2(ExplainedVariance):
    """``1 - mean ||x - x_hat||^2 / sum_i var(x)_i``.

    SAELens's ``explained_variance``, where a constant offset counts as error.
    """

    def compute(self) -> Tensor:
        """R squared over all tokens seen."""
        variance = self.square_sum - self.sum.square().sum() / self.n_tokens
        return (1 - self.error_square_sum / variance).float()


class MSE(Metric):
    """Mean over tokens and dimensions of ``(x - x_hat)^2``, in squared activation units (the paper's form.

    No sum over ``d_in``).
    """

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


class SquaredError(TokenMean):
    """Mean over tokens of ``||x - x_hat||^2``, summed over ``d_in``: what SAELens calls ``mse``."""

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add inputs and reconstructions of shape (..., d_in)."""
        self.add((x.double() - x_hat.double()).square().sum(dim=-1))


class Cosine(TokenMean):
    """Mean over tokens of the cosine between ``x`` and ``x_hat``, as SAELens's ``cossim``.

    0 where one of them is zero.
    """

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add inputs and reconstructions of shape (..., d_in)."""
        self.add(torch.nn.functional.cosine_similarity(x.double(), x_hat.double(), dim=-1))


class ShrinkageRatio(Metric):
    """``||x_hat||_1 / ||x||_1`` summed over tokens, dimensionless.

    Below 1 the reconstruction is too small.
    """

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


class L2Ratio(TokenMean):
    """Mean over tokens of ``||x_hat|| / ||x||``, as SAELens's ``l2_ratio``."""

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add inputs and reconstructions of shape (..., d_in)."""
        self.add(x_hat.double().norm(dim=-1) / x.double().norm(dim=-1).clamp_min(1e-12))


class RelativeReconstructionBias(Metric):
    """``mean ||x_hat||^2 / mean x .

    X_hat`` (equation 10 of arXiv:2404.16014); below 1 the reconstruction is too small.
    """

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
