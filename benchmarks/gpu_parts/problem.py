"""Weights and batches of a given sparsity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

L1, L2, CLIP = 0.5, 0.05, 1.0
SILENT = 0.45
N_BATCHES = 4


class Problem:
    """Weights and batches with a given mean L0. ``heavy``: 45 % of the features silent, the others' rates as 1/rank^0.8."""

    def __init__(
        self, batch: int, d_in: int, d_sae: int, l0: float, device: str, *, heavy: bool = False
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        def rows(n: int) -> Tensor:
            x = normal(n, d_in)
            return x.div_(x.norm(dim=1, keepdim=True))

        self.batches = [rows(batch).mul_(d_in**0.5) for _ in range(N_BATCHES)]
        self.W_dec = rows(d_sae)
        rates = torch.full((d_sae,), l0 / d_sae, dtype=torch.float64)
        if heavy:
            rates = torch.arange(1, d_sae + 1, dtype=torch.float64).pow(-0.8)
            rates[int((1 - SILENT) * d_sae) :] = 0
            for _ in range(20):  # no feature fires more than on half the tokens
                rates = (rates * (l0 / rates.sum())).clamp_max(0.5)
            rates = rates[torch.randperm(d_sae, generator=torch.Generator().manual_seed(1))]
        # a pre-activation of these tokens has a standard normal distribution
        self.b_enc = torch.special.ndtri(rates).clamp_min(-1e3).float().to(device)
        self.b_dec = torch.zeros(d_in, device=device)
        self.shape, self.l0, self.heavy, self.device = (batch, d_in, d_sae), l0, heavy, device
        self.turn = 0

    def next_batch(self) -> Tensor:
        """The batches in turn."""
        self.turn += 1
        return self.batches[self.turn % N_BATCHES]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Fresh copies of the weights."""
        tensors = {"W_enc": self.W_dec.t(), "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return {
            name: nn.Parameter(value.clone(memory_format=torch.contiguous_format))
            for name, value in tensors.items()
        }
