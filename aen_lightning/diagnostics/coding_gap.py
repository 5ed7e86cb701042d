"""The coding gap: how much of a dictionary's error and starvation is the amortised encoder's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from aen_lightning.diagnostics.coding import (
    Code,
    coding_gap_bound,
    coding_objective,
    proximal_steps,
    solve_coding,
    solve_on_support,
)
from aen_lightning.diagnostics.quantiles import summarize
from aen_lightning.metrics import ACTIVE_THRESHOLD
from aen_lightning.saes.penalty import adaptive_weights


@dataclass
class CodingProblem:
    """The penalty that a dictionary was trained with, in the units of the space it was trained in.

    Args:
        l1: ``l1_coefficient * u_j``, shape (d_sae,), ``> 0``.
        l2: ``l2_coefficient``.
        scale: Norm that the decoder rows have instead of the 1 they were trained at (an average input scale
            was folded in); inputs, dictionary and biases are divided by it.
        source: In words, where the numbers come from.
    """

    l1: Tensor
    l2: float
    scale: float
    source: str


def coding_problem(
    sae: SAE[Any],
    *,
    mean_feature_acts: Tensor | None = None,
    l1_coefficient: float | None = None,
    l2_coefficient: float | None = None,
    l1_weights: Tensor | None = None,
) -> CodingProblem:
    """The coding problem of a dictionary, from what it says of its training or from the arguments.

    Args:
        sae: The dictionary; ``training_architecture_details`` in its metadata has the coefficients of ``aen``
            and ``standard`` ones.
        mean_feature_acts: Mean activation of each feature per token, shape (d_sae,). The adaptive weights are
            not in an exported dictionary; with ``gamma > 0`` they are computed anew from this by the formula
            of training.
        l1_coefficient: In SAELens's form; None: from the metadata.
        l2_coefficient: In SAELens's form; None: from the metadata, 0 if it has none.
        l1_weights: u, shape (d_sae,); None: as above, or 1.

    Raises:
        ValueError: If no L1 coefficient is known, e.g. for a TopK dictionary.
    """
    details = sae.cfg.metadata["training_architecture_details"] or {}
    kind = sae.cfg.metadata["training_architecture"]
    norms = sae.W_dec.detach().double().norm(dim=-1)
    source = "given" if l1_coefficient is not None else f"metadata of its training as {kind}"
    if l1_coefficient is None:
        # TargetL0 multiplies the coefficient of the config
        l1_coefficient = sae.cfg.metadata["reached_l1_coefficient"] or details.get("l1_coefficient")
    if not l1_coefficient or l1_coefficient < 0:
        raise ValueError(
            f"the coding problem needs an L1 coefficient above 0, and this dictionary (trained as {kind}) "
            "states "
            f"{l1_coefficient}: give l1_coefficient (and l2_coefficient) to compare with"
        )
    l2 = float(details.get("l2_coefficient") or 0.0) if l2_coefficient is None else float(l2_coefficient)
    scale, weights = 1.0, torch.ones(sae.cfg.d_sae, dtype=torch.float64, device=norms.device)
    if kind == "aen":
        scale = float(norms.median())
        gamma = float(details.get("gamma") or 0.0)
        if l1_weights is None and gamma > 0:
            if mean_feature_acts is None:
                raise ValueError(
                    "this dictionary was trained with adaptive weights, which its weights file does not "
                    "hold: give l1_weights, or "
                    "mean_feature_acts to compute them from"
                )
            weights = adaptive_weights(
                mean_feature_acts.double().to(norms.device),
                gamma=gamma,
                reference_fraction=float(details["reference_fraction"]),
                weight_min=float(details["weight_min"]),
                weight_max=float(details["weight_max"]),
            )
            source += "; adaptive weights from the mean activations measured here"
    elif kind == "standard":
        weights = norms  # SAELens's L1 counts an activation by the norm of its decoder row
    if l1_weights is not None:
        if l1_weights.shape != weights.shape:
            raise ValueError(
                f"l1_weights must have shape {tuple(weights.shape)}, got {tuple(l1_weights.shape)}"
            )
        weights, source = l1_weights.double().to(norms.device), f"{source}; adaptive weights given"
    return CodingProblem(l1_coefficient * weights, l2, scale, source)


@torch.no_grad()
def coding_gap(
    x: Tensor,
    feature_acts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    problem: CodingProblem,
    *,
    dead: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    max_iterations: int = 500,
    n_refine: int = 0,
) -> tuple[dict[str, Any], Code]:
    """Compare the encoder's codes with exact ones.

    Args:
        x: Inputs in the space the dictionary was trained in, shape (n, d_in).
        feature_acts: The encoder's codes of them, shape (n, d_sae), ``>= 0``.
        W_dec: Dictionary, shape (d_sae, d_in).
        b_dec: Shape (d_in,).
        problem: The penalty.
        dead: Features that never fired on many tokens, bool, shape (d_sae,); do exact codes use them?
        dtype: Of the products; float32 for dictionaries whose float64 copy would not fit.
        max_iterations: Of FISTA.
        n_refine: Proximal steps on the encoder's codes whose result is reported too; 0: none.

    Returns:
        The section ``coding_gap`` of the JSON, and the exact codes. In it ``objective``: means of the
        encoder's, of the best on the encoder's support and the exact optimum; ``excess_pct``: how far the
        encoder's lies above the optimum (mean over tokens of the ratio's excess, in percent); of that excess
        ``from_magnitudes_share``, which the best magnitudes on the same features (zero among them) would take
        back, and ``from_support_share``, which is lost by features left out; ``squared_error``, ``l0``,
        ``explained_variance`` of both; ``support``: precision, recall and Jaccard of the encoder's support
        against the optimal one (means over tokens); ``starvation``: features that fire in the sample by
        encoder and by optimum, and of the ``dead`` ones how many the exact codes use; ``certificate``:
        ``max_relative_gap``, the largest duality gap relative to the objective, which bounds the error of all
        of the above.
    """
    W, l1 = W_dec.to(dtype) / problem.scale, problem.l1.to(x.device, dtype)
    y = (x.to(dtype) - b_dec.to(dtype)) / problem.scale
    h = feature_acts.to(dtype)
    if (h < 0).any():
        raise ValueError(
            "the coding problem is for codes that are not negative, and this dictionary's are signed"
        )
    exact = solve_coding(y, W, l1=l1, l2=problem.l2, start=h, max_iterations=max_iterations)
    own, own_gap = coding_gap_bound(y, W, h, l1=l1, l2=problem.l2)
    refit = _best_on_support(y, W, l1, problem.l2, h)
    on_support = torch.minimum(own, coding_objective(y, W, refit, l1=l1, l2=problem.l2))
    on_support = torch.maximum(on_support, exact.objective)
    excess = (own - exact.objective).clamp_min(0)
    active, best = h > ACTIVE_THRESHOLD, exact.feature_acts > ACTIVE_THRESHOLD
    hits, n_own, n_best = (a.sum(dim=-1).double() for a in (active & best, active, best))
    fires, used = active.any(dim=0), best.any(dim=0)
    section: dict[str, Any] = {
        "n_tokens": len(x),
        "l1_coefficient_mean": float(problem.l1.mean()),
        "l2_coefficient": problem.l2,
        "source": problem.source,
        "objective": {
            "encoder": float(own.mean()),
            "best_on_support": float(on_support.mean()),
            "exact": float(exact.objective.mean()),
        },
        "excess_pct": summarize(100 * excess / exact.objective.clamp_min(torch.finfo(dtype).tiny)),
        "from_magnitudes_share": _ratio(float((own - on_support).sum()), float(excess.sum())),
        "from_support_share": _ratio(float((on_support - exact.objective).sum()), float(excess.sum())),
        "squared_error": {"encoder": _error(y, W, h), "exact": _error(y, W, exact.feature_acts)},
        "explained_variance": {"encoder": _ev(y, W, h), "exact": _ev(y, W, exact.feature_acts)},
        "l0": {"encoder": float(n_own.mean()), "exact": float(n_best.mean())},
        "support": {
            "precision": float((hits / n_own.clamp_min(1)).mean()),
            "recall": float((hits / n_best.clamp_min(1)).mean()),
            "jaccard": float((hits / (n_own + n_best - hits).clamp_min(1)).mean()),
        },
        "starvation": {
            "features_fired_by_encoder": int(fires.sum()),
            "features_fired_by_exact": int(used.sum()),
            "features_only_exact": int((used & ~fires).sum()),
            "features_only_encoder": int((fires & ~used).sum()),
            "dead": None if dead is None else int(dead.sum()),
            "dead_used_by_exact": None if dead is None else int((used & dead.to(used.device)).sum()),
        },
        "certificate": {
            "max_relative_gap": float((exact.gap / exact.objective.clamp_min(torch.finfo(dtype).tiny)).max()),
            "encoder_gap_mean": float(own_gap.mean()),
            "dtype": str(dtype).removeprefix("torch."),
        },
    }
    if n_refine:
        refined = proximal_steps(y, W, h, l1=l1, l2=problem.l2, n_steps=n_refine)
        section["refined"] = {
            "n_steps": n_refine,
            "objective": float(coding_objective(y, W, refined, l1=l1, l2=problem.l2).mean()),
            "squared_error": _error(y, W, refined),
            "explained_variance": _ev(y, W, refined),
            "l0": float((refined > ACTIVE_THRESHOLD).sum(dim=-1).double().mean()),
        }
    return section, exact


def _best_on_support(y: Tensor, W: Tensor, l1: Tensor, l2: float, h: Tensor) -> Tensor:
    out = h.clone()
    for i in range(len(y)):
        chosen = (h[i] > 0).nonzero().flatten()
        out[i].index_copy_(0, chosen, solve_on_support(y[i], W[chosen], l1[chosen], l2).to(out.dtype))
    return out


def _error(y: Tensor, W: Tensor, h: Tensor) -> float:
    return float((y - h @ W).square().sum(dim=-1).mean())


def _ev(y: Tensor, W: Tensor, h: Tensor) -> float | None:
    spread = y - y.mean(dim=0)
    error = y - h @ W
    return _ratio(
        float(spread.square().sum() - (error - error.mean(dim=0)).square().sum()),
        float(spread.square().sum()),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
