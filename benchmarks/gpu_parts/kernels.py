"""Every kernel against dense float64."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from aen_lightning import sparse
from aen_lightning.sparse import backend
from gpu_parts import TRITON
from gpu_parts.problem import L1, L2


def kernel_errors(device: str) -> list[dict[str, Any]]:
    """Each kernel against dense float64 on a small problem with empty features and one that fires on every token.

    Outputs are poisoned with NaN. Errors are relative to the largest entry of the exact result.
    """
    kind = "triton" if TRITON and (device == "cuda" or os.environ.get("TRITON_INTERPRET")) else "torch"
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then gives NaN
    try:
        return [
            {"name": name, "max_error": error, "backend": kind}
            for name, error in sorted(_kernel_errors(device, kind).items())
        ]
    finally:
        torch.use_deterministic_algorithms(False)


def _relative(actual: Tensor, exact: Tensor) -> float:
    error = (actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)
    return float(error) if bool(error.isfinite()) else float("inf")


def _kernel_errors(device: str, kind: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    batch, d_in, d_sae = (24, 37, 48) if device == "cpu" else (300, 1000, 2000)
    x, W_enc, W_dec, b_enc = normal(batch, d_in), normal(d_in, d_sae), normal(d_sae, d_in), normal(d_sae) - 3
    b_enc[::5], b_enc[1] = -1e3, 1e3
    b_dec = normal(d_in)
    pre = (x.double() - b_dec.double()) @ W_enc.double() + b_enc.double()
    h = pre.relu()
    errors = {}
    moved = nn.Parameter(W_dec.clone())
    moved.grad = normal(d_sae, d_in)
    moved.grad[::3] = 0
    exact_row = moved.detach().double() - 1e-2 * moved.grad.double().sign()  # Adam's first step, eps aside
    exact_row = torch.where(moved.grad == 0, moved.detach().double(), exact_row)
    exact_row = exact_row / exact_row.norm(dim=1, keepdim=True)
    with _kernels(kind):
        optimizer = sparse.RowAdam([moved], lr=1e-2, eps=1e-30)
        optimizer.hold_rows(moved, lambda: torch.ones(d_sae, device=device))
        optimizer.step()
        errors["Adam, clip, projection"] = _relative(moved.detach(), exact_row)
        padded = sparse.encode(x, W_enc, b_enc, b_dec, capacity=batch * d_sae, screen=False)
        errors["compaction, padded"] = _relative(padded.to_dense(), h)
        for name, make, keep in (
            ("TopK", lambda: sparse.encode_topk(x, W_enc, b_enc, b_dec, k=4), 4),
            ("BatchTopK", lambda: sparse.encode_batch_topk(x, W_enc, b_enc, b_dec, k=4), 4 * batch),
        ):
            flat = h if name == "TopK" else h.view(1, -1)
            top = torch.zeros_like(flat).scatter(1, flat.topk(keep, dim=1).indices, 1.0) * flat
            errors[name] = _relative(make().to_dense(), top.view_as(h))
        threshold = torch.full_like(b_enc, 0.5)
        jump = sparse.encode(
            x, W_enc, b_enc, b_dec, threshold=threshold, capacity=batch * d_sae, screen=False
        )
        errors["JumpReLU"] = _relative(jump.to_dense(), h * (h > 0.5))
        ones = torch.full_like(b_enc, 0.1)
        gated = sparse.gated_loss(x, padded, W_enc, b_enc, ones, b_enc + 0.3, W_dec, b_dec)
        magnitude = (ones.double().exp() * (pre - b_enc.double()) + b_enc.double() + 0.3).relu() * (pre > 0)
        errors["gated"] = _relative(gated.code.to_dense(), magnitude)
        code = sparse.encode(x, W_enc, b_enc, b_dec, screen=False)
        errors["compaction"] = _relative(code.to_dense(), h)
        errors["statistics"] = _relative(code.feature_sums, h.sum(dim=0))
        at = torch.zeros_like(h)
        at[code.tokens, code.features] = sparse.per_entry(b_enc, code).double()
        errors["per entry"] = _relative(at, b_enc.double() * (h > 0))
        p = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        p = {name: nn.Parameter(value.clone()) for name, value in p.items()}
        out = sparse.loss(x, code, **p, l1_weights=torch.full_like(b_enc, L1), l2_coefficient=L2)
        grads = torch.autograd.grad(out.loss, list(p.values()))
    exact = {name: value.detach().double().requires_grad_() for name, value in p.items()}
    h = ((x.double() - exact["b_dec"]) @ exact["W_enc"] + exact["b_enc"]).relu()
    sae_out = h @ exact["W_dec"] + exact["b_dec"]
    loss = (sae_out - x).square().sum(dim=1).mean() + L1 * h.sum(1).mean() + L2 * h.square().sum(1).mean()
    errors["decode"] = _relative(out.sae_out.detach(), sae_out.detach())
    errors["loss"] = _relative(out.loss.detach(), loss.detach())
    for name, actual, wanted in zip(p, grads, torch.autograd.grad(loss, list(exact.values())), strict=True):
        errors[f"gradient of {name}"] = _relative(actual, wanted)
    return errors


class _kernels:  # a context manager
    """Triton's kernels on a CPU as well, which the interpreter can do."""

    def __init__(self, kind: str) -> None:
        self.on_cpu = kind == "triton" and not torch.cuda.is_available()

    def __enter__(self) -> None:
        if self.on_cpu:
            self.before = backend.triton_serves
            backend.triton_serves = lambda device: True

    def __exit__(self, *exc: Any) -> None:
        if self.on_cpu:
            backend.triton_serves = self.before
