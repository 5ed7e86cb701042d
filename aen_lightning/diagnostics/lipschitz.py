"""How far a small change of the input can move the code: the encoder's, and the exact coding map's."""

from __future__ import annotations

import math
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from aen_lightning.diagnostics.coding import solve_coding, spectral_norm
from aen_lightning.diagnostics.coding_gap import CodingProblem
from aen_lightning.diagnostics.quantiles import summarize
from aen_lightning.evaluate.dictionary import run_dictionary
from aen_lightning.metrics import ACTIVE_THRESHOLD, finite

_CONTINUOUS = ("standard", "aen")


def coding_bound(l2: float) -> float:
    """Lipschitz constant that the L2 term guarantees the exact coding map: ``1 / (2 sqrt(l2))``, infinite at
    0.

    For codes d apart on inputs e apart, optimality gives ``|dW|^2 + l2 |d|^2 <= |dW| |e|``; the right side
    less ``|dW|^2`` is at most ``|e|^2 / 4``.
    """
    return math.inf if l2 == 0 else 0.5 / math.sqrt(l2)


@torch.no_grad()
def encoder_lipschitz(
    sae: SAE[Any],
    x: Tensor,
    feature_acts: Tensor,
    *,
    relative_step: float = 1e-3,
    n_directions: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Lipschitz constants of the encoder, in the space the dictionary was trained in (inside
    ``scaled_space``).

    Args:
        sae: The dictionary, inside :func:`aen_lightning.evaluate.dictionary.scaled_space`.
        x: Real inputs in that space, shape (n, d_in).
        feature_acts: Their codes, shape (n, d_sae).
        relative_step: Length of the steps around each input, as a share of its norm.
        n_directions: Random directions a step is taken in, besides one towards another real input.
        seed: Of the directions.

    Returns:
        The section ``lipschitz.encoder``. ``bound``: ``||W_enc||_2``, the constant of a ReLU encoder;
        ``is_continuous``: whether the architecture is one (TopK and JumpReLU encoders jump, and no constant
        exists); ``local``: per input ``||W_enc[:, A]||_2`` on its active set, the constant nearby;
        ``empirical``: per input the largest ``|dh| / |dx|`` over the steps; ``between_inputs``: the same
        between real inputs at their full distance.
    """
    W_enc = sae.W_enc.detach().to(x.dtype)
    local = [
        float(torch.linalg.matrix_norm(W_enc[:, a], 2)) if a.any() else 0.0 for a in _active(feature_acts)
    ]
    generator = torch.Generator(x.device).manual_seed(seed)
    steps = _steps(x, relative_step, n_directions, generator)
    moved = [
        (run_dictionary(sae, x + step)[0] - feature_acts).norm(dim=-1) / step.norm(dim=-1) for step in steps
    ]
    apart = x - x.roll(1, dims=0)
    between = (feature_acts - feature_acts.roll(1, dims=0)).norm(dim=-1) / apart.norm(dim=-1)
    return {
        "bound": spectral_norm(W_enc),
        "is_continuous": sae.cfg.architecture() in _CONTINUOUS,
        "local": summarize(torch.tensor(local, dtype=torch.float64)),
        "empirical": summarize(torch.stack(moved).amax(dim=0)),
        "between_inputs": summarize(between[apart.norm(dim=-1) > 0]),
        "relative_step": relative_step,
    }


@torch.no_grad()
def coding_map_lipschitz(
    x: Tensor,
    exact: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    problem: CodingProblem,
    *,
    relative_step: float = 1e-3,
    n_directions: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Lipschitz constants of the exact coding map around real inputs, against the bound of the L2 term.

    Args:
        x: Inputs in the space the dictionary was trained in, shape (n, d_in).
        exact: Their exact codes, shape (n, d_sae), in the dtype to compute in.
        W_dec: Dictionary, shape (d_sae, d_in).
        b_dec: Shape (d_in,).
        problem: The penalty.
        relative_step: As in :func:`encoder_lipschitz`.
        n_directions: As there; each costs another exact solution.
        seed: As there.

    Returns:
        The section ``lipschitz.coding_map``. ``bound``: :func:`coding_bound` (None if l2 is 0, where there is
        none); ``local``: per input ``max_s s / (s^2 + l2)`` over the singular values of its active atoms, the
        constant while the support stays; ``empirical``: per input the largest ``|dh| / |dx|``, solved anew.
    """
    W, l1 = W_dec.to(exact.dtype) / problem.scale, problem.l1.to(exact.device, exact.dtype)
    y = (x.to(exact.dtype) - b_dec.to(exact.dtype)) / problem.scale
    local = []
    for active in _active(exact):
        s = torch.linalg.svdvals(W[active]) if active.any() else W.new_zeros(1)
        s = s[s > s.max() * 1e-9]
        local.append(float((s / (s.square() + problem.l2)).max()) if len(s) else 0.0)
    generator = torch.Generator(y.device).manual_seed(seed)
    ratios = []
    for step in _steps(y, relative_step, n_directions, generator):
        moved = solve_coding(y + step, W, l1=l1, l2=problem.l2, start=exact).feature_acts
        ratios.append((moved - exact).norm(dim=-1) / step.norm(dim=-1))
    return {
        "bound": finite(coding_bound(problem.l2)),
        "local": summarize(torch.tensor(local, dtype=torch.float64)),
        "empirical": summarize(torch.stack(ratios).amax(dim=0)),
        "relative_step": relative_step,
    }


def _active(feature_acts: Tensor) -> Tensor:
    return feature_acts.abs() > ACTIVE_THRESHOLD


def _steps(x: Tensor, relative: float, n_directions: int, generator: torch.Generator) -> list[Tensor]:
    """Steps of one length: in random directions, and towards the next input."""
    length = relative * x.norm(dim=-1, keepdim=True)
    directions = [
        torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) for _ in range(n_directions)
    ]
    if len(x) > 1:
        directions.append(x.roll(1, dims=0) - x)
    return [length * torch.nn.functional.normalize(d, dim=-1) for d in directions]
