"""A small SAE in plain tensors, and its objective as the formula reads, for autograd to differentiate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aen_lightning import sparse

F64 = torch.float64
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def make_parameters(
    d_in: int, d_sae: int, *, bias: float = 0.0, seed: int = 0, dtype: torch.dtype = F64
) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    tensors = {
        "W_enc": normal(d_in, d_sae) / d_in**0.5,
        "b_enc": bias + 0.1 * normal(d_sae),
        "W_dec": normal(d_sae, d_in),
        "b_dec": 0.1 * normal(d_in),
    }
    return {name: nn.Parameter(tensor.to(dtype)) for name, tensor in tensors.items()}


def make_batch(batch: int, d_in: int, seed: int = 1, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(batch, d_in, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def dense_terms(
    x: Tensor,
    p: Mapping[str, Tensor],
    weights: Tensor,
    l2: float,
    apply_b_dec_to_input: bool = True,
    activation: Callable[[Tensor], Tensor] = torch.relu,
    slope: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The objective as the formula reads; the slope of each activation's penalty is held constant."""
    h = activation((x - p["b_dec"] if apply_b_dec_to_input else x) @ p["W_enc"] + p["b_enc"])
    sae_out = h @ p["W_dec"] + p["b_dec"]
    mse = (sae_out - x).pow(2).sum(dim=-1).mean()
    paid = h if slope is None else slope(h.detach()) * h
    return mse, (weights * paid).sum(dim=-1).mean(), l2 * h.pow(2).sum(dim=-1).mean(), sae_out


def encode(
    x: Tensor, p: dict[str, Any], *, apply_b_dec_to_input: bool = True, **kwargs: Any
) -> sparse.SparseCode:
    return sparse.encode(x, p["W_enc"], p["b_enc"], p["b_dec"] if apply_b_dec_to_input else None, **kwargs)


def gradients(loss: Tensor, p: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
