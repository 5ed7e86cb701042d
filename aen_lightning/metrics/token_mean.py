"""The base of metrics that average a number per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMean(Metric):
    """Mean over tokens of a number per token."""

    full_state_update = False
    is_differentiable = False
    total: Tensor
    n_tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_tokens", torch.tensor(0), dist_reduce_fx="sum")

    def add(self, per_token: Tensor) -> None:
        """Add a number for each token, of any shape."""
        self.total = self.total + per_token.double().sum()
        self.n_tokens = self.n_tokens + per_token.numel()

    def compute(self) -> Tensor:
        """The mean over tokens."""
        return self.total / self.n_tokens
