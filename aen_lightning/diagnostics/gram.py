"""Geometry of the atoms that are active together: spectrum, leakage, cross-leverage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aen_lightning.diagnostics.quantiles import summarize
from aen_lightning.metrics import ACTIVE_THRESHOLD, unit_rows


@torch.no_grad()
def active_gram(W_dec: Tensor, feature_acts: Tensor, *, chunk_size: int = 8192) -> dict[str, Any]:
    """Per token, the geometry of its active set A, with atoms at unit norm; then quantiles over tokens.

    Args:
        W_dec: Dictionary, shape (d_sae, d_in).
        feature_acts: Codes, shape (n, d_sae); tokens with no active feature are left out.
        chunk_size: Atoms a chunk, where all inactive atoms are looked at.

    Returns:
        The section ``active_gram`` of the JSON. ``n_tokens`` looked at; and, each with mean and quantiles
        over them: ``min_eigenvalue``, ``max_eigenvalue`` of ``D_A^T D_A``, and ``condition_number``, their
        ratio (None where infinite: the active atoms are dependent to rounding); ``leakage``: ``||D_Ac^T
        D_A||_F``, over the inactive atoms Ac, and ``leakage_per_pair``: its root mean square per pair of
        atoms, which compares dictionaries of different sizes; ``cross_leverage_mean``,
        ``cross_leverage_max``: over the inactive atoms, the squared norm of the projection on the span of D_A
        (a unit atom at 1 can be written by the active ones alone).

    Source: arXiv:2605.05341, section 6.
    """
    if feature_acts.ndim != 2 or feature_acts.shape[1] != len(W_dec):
        raise ValueError(f"feature_acts must be (n, d_sae={len(W_dec)}), got {tuple(feature_acts.shape)}")
    atoms = unit_rows(W_dec, chunk_size=chunk_size)
    rows: dict[str, list[float]] = {
        name: []
        for name in (
            "min_eigenvalue", "max_eigenvalue", "condition_number", "leakage", "leakage_per_pair",
            "cross_leverage_mean", "cross_leverage_max",
        )
    }  # fmt: skip
    for acts in feature_acts:
        active = acts.abs() > ACTIVE_THRESHOLD
        if not active.any():
            continue
        D = atoms[active].double()
        k, n_inactive = len(D), len(atoms) - int(active.sum())
        _, singular, span = torch.linalg.svd(D, full_matrices=False)
        rank = int((singular > singular[0] * max(D.shape) * torch.finfo(atoms.dtype).eps).sum())
        low = singular[-1].square() if k <= D.shape[1] and rank == k else torch.zeros(())
        basis = span[:rank]
        leak = leverage_sum = leverage_max = 0.0
        for start in range(0, len(atoms), chunk_size):
            # products first, then the choice of rows: copying atoms would cost more than multiplying them
            along = (atoms[start : start + chunk_size] @ basis.T.to(atoms.dtype))[
                ~active[start : start + chunk_size]
            ]
            if len(along) == 0:
                continue
            leverage = along.square().sum(dim=-1)
            leverage_sum += float(leverage.sum(dtype=torch.float64))
            leverage_max = max(leverage_max, float(leverage.max()))
            # D_A = U S V on its span, so that a product with it is one with S V, up to a rotation
            leak += float((along.double() * singular[:rank]).square().sum())
        rows["min_eigenvalue"].append(float(low))
        rows["max_eigenvalue"].append(float(singular[0].square()))
        rows["condition_number"].append(float(singular[0].square() / low) if low > 0 else float("inf"))
        rows["leakage"].append(leak**0.5)
        rows["leakage_per_pair"].append((leak / max(1, k * n_inactive)) ** 0.5)
        rows["cross_leverage_mean"].append(leverage_sum / max(1, n_inactive))
        rows["cross_leverage_max"].append(leverage_max)
    found: dict[str, Any] = {"n_tokens": len(rows["leakage"])}
    return found | {
        name: summarize(torch.tensor(values, dtype=torch.float64)) for name, values in rows.items()
    }
