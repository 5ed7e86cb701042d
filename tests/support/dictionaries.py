"""Random dictionaries whose geometry is known."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import SAE
from torch.nn.functional import normalize

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=generator(seed)))[0][:n]


def relu_dictionary(
    d_in: int, d_sae: int, *, seed: int = 0, normalize_activations: str = "none", **training: Any
) -> SAE[Any]:
    """A random SAELens dictionary with a unit decoder, tied encoder and metadata as training leaves them."""
    g = generator(seed)
    sae = SAE.from_dict(
        {
            "architecture": "standard", "d_in": d_in, "d_sae": d_sae, "normalize_activations": normalize_activations,
            "metadata": {"training_architecture": "aen", "training_architecture_details": training},
        }
    )  # fmt: skip
    W = normalize(torch.randn(d_sae, d_in, generator=g), dim=-1)
    state = {
        "W_dec": W,
        "W_enc": W.T.contiguous(),
        "b_enc": -0.3 * torch.ones(d_sae),
        "b_dec": torch.zeros(d_in),
    }
    sae.load_state_dict(state)
    return sae.requires_grad_(False)
