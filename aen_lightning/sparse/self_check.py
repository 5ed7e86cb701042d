"""A small problem that the Triton kernels must solve before they are used on a device."""

from __future__ import annotations

import torch

from aen_lightning.sparse.dense import encode_dense
from aen_lightning.sparse.encoding import encode
from aen_lightning.sparse.objective import loss

_TOLERANCE = 1e-4  # relative to the largest entry; both sides are float32, in other orders of summation


def check_kernels(device: torch.device) -> None:
    """Take a step by kernels and densely.

    Raises:
        RuntimeError: If they differ; or whatever a compiler or a driver raises.
    """
    generator = torch.Generator().manual_seed(0)
    d_in, d_sae = 40, 70

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x = normal(300, d_in)  # more than a chunk of tokens
    p = {
        "W_enc": normal(d_in, d_sae),
        "b_enc": normal(d_sae) - 14,
        "W_dec": normal(d_sae, d_in),
        "b_dec": normal(d_in),
    }
    p["b_enc"][0], p["b_enc"][1] = 100.0, -100.0
    weights = torch.linspace(0.1, 1, d_sae, device=device)
    with torch.autocast(device.type, enabled=False), torch.enable_grad():
        found = []
        for encoded in (encode(x, *_encoder(p), capacity=2**13), encode_dense(x, *_encoder(p))):
            leaves = {name: value.clone().requires_grad_() for name, value in p.items()}
            out = loss(x, encoded, **leaves, l1_weights=weights, l2_coefficient=0.1)
            found.append([out.loss.detach(), *torch.autograd.grad(out.loss, list(leaves.values()))])
    for name, actual, expected in zip(("loss", *p), *found, strict=True):
        error = (actual - expected).abs().max() / expected.abs().max()
        if not bool(error < _TOLERANCE):
            raise RuntimeError(f"{name} is off by {float(error):.1e} of its largest entry")


def _encoder(p: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return p["W_enc"], p["b_enc"], p["b_dec"]
