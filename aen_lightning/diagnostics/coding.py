r"""The coding problem of an adaptive elastic net, solved exactly on a given dictionary.

For an input y (``x - b_dec``) and a dictionary W (rows are atoms), per token::

    P(h) = ||y - h W||^2  +  sum_j c_j h_j  +  l2 ||h||^2,     h >= 0,     c_j = l1 u_j

Its dual, for any vector t of width d_in (from ``||r||^2 = max_t 2 t.r - ||t||^2``), with ``v_j = 2 t.w_j -
c_j``::

    D(t) = 2 t.y - ||t||^2 - sum_j max(0, v_j)^2 / (4 l2)          (l2 > 0)
    D(t) = 2 t.y - ||t||^2    where all v_j <= 0                     (l2 = 0)

``P(h) - D(t)`` bounds how far h is from the optimum, whatever h and t: that is the certificate returned. At
the optimum t is the residual ``y - h W``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

_CHECK_EVERY = 25
_ADDED_PER_ROUND = 64
_PROXIMAL_STEPS = 100


@dataclass
class Code:
    """Codes with their certificate.

    Args:
        feature_acts: h, shape (n, d_sae), ``>= 0``.
        objective: P(h) per token, shape (n,).
        gap: Upper bound of ``P(h) - min P`` per token, shape (n,), ``>= 0`` to rounding.
    """

    feature_acts: Tensor
    objective: Tensor
    gap: Tensor


def coding_objective(y: Tensor, W: Tensor, h: Tensor, *, l1: Tensor, l2: float) -> Tensor:
    """P(h) per token, shape (n,). ``l1`` holds c, shape (d_sae,)."""
    return (y - h @ W).square().sum(dim=-1) + h @ l1 + l2 * h.square().sum(dim=-1)


def coding_gap_bound(y: Tensor, W: Tensor, h: Tensor, *, l1: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """P(h) and an upper bound of ``P(h) - min P``, each (n,), from the residual of h as dual point, as it is
    or shrunk.

    Shrunk until every constraint holds (``v <= 0``) it is a dual point for any l2; the better of the two
    counts.
    """
    residual = y - h @ W
    objective = residual.square().sum(dim=-1) + h @ l1 + l2 * h.square().sum(dim=-1)
    product = 2 * residual @ W.T
    along, norm = (residual * y).sum(dim=-1), residual.square().sum(dim=-1)
    positive = product > 0
    ratio = torch.where(positive, l1 / product.where(positive, torch.ones_like(product)), torch.inf)
    shrink = (along / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_min(0)
    shrink = torch.minimum(shrink, ratio.min(dim=-1).values)
    dual = 2 * shrink * along - shrink.square() * norm
    if l2 > 0:
        excess = (product - l1).clamp_min_(0).square().sum(dim=-1) / (4 * l2)
        dual = torch.maximum(dual, 2 * along - norm - excess)
    return objective, objective - dual


@torch.no_grad()
def solve_coding(
    y: Tensor,
    W: Tensor,
    *,
    l1: Tensor | float,
    l2: float,
    start: Tensor | None = None,
    tolerance: float | None = None,
    max_iterations: int = 500,
    max_rounds: int = 50,
) -> Code:
    """Solve the coding problem for a batch of inputs.

    FISTA with adaptive restart (O'Donoghue & Candes, 2015) finds which atoms matter; then each token is
    solved exactly on its own working set (non-negative least squares), and the atoms that violate optimality
    most are added until none does. The objective falls with every round, so this ends at the optimum. The gap
    says how exact the answer is.

    Args:
        y: Inputs less ``b_dec``, shape (n, d_in), float32 or float64; all products are in its dtype.
        W: Dictionary, shape (d_sae, d_in), same dtype.
        l1: c, shape (d_sae,) or one number, ``> 0``.
        l2: ``>= 0``.
        start: First guess, shape (n, d_sae), e.g. the encoder's code.
        tolerance: Gap relative to ``max(P, ||y||^2 * 1e-3)`` at which a token is done; None: 1e-12 in
            float64, 1e-5 in float32.
        max_iterations: Of FISTA.
        max_rounds: Of the working sets.

    Raises:
        ValueError: For coefficients out of range or shapes that do not fit.
    """
    if y.ndim != 2 or W.ndim != 2 or y.shape[1] != W.shape[1]:
        raise ValueError(
            f"y (n, d_in) and W (d_sae, d_in) must fit, got {tuple(y.shape)} and {tuple(W.shape)}"
        )
    c = torch.as_tensor(l1, dtype=y.dtype, device=y.device).expand(len(W))
    if not (torch.isfinite(c).all() and (c > 0).all() and l2 >= 0):
        raise ValueError(
            f"the coding problem needs l1 > 0 and l2 >= 0, got l1 from {float(c.min())} and l2 {l2}"
        )
    if tolerance is None:
        tolerance = 1e-12 if y.dtype == torch.float64 else 1e-5
    h = (
        torch.zeros(len(y), len(W), dtype=y.dtype, device=y.device)
        if start is None
        else start.to(y).clamp_min(0)
    )
    floor = 1e-3 * y.square().sum(dim=-1).clamp_min(torch.finfo(y.dtype).tiny)

    def certify(h: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        objective, gap = coding_gap_bound(y[at], W, h, l1=c, l2=l2)
        return objective, gap, gap > tolerance * torch.maximum(objective, floor[at])

    everything = torch.arange(len(y), device=y.device)
    # a loose answer is enough to find the working sets
    h = _fista(y, W, c, l2, h, max_iterations=max_iterations, tolerance=max(tolerance, 1e-4), floor=floor)
    objective, gap, open_ = certify(h, everything)
    rounding = 64 * torch.finfo(y.dtype).eps * y.square().sum(dim=-1)
    # at least one round for all: a gap of 1e-12 still allows an error of 1e-6 in the code
    open_ = torch.ones_like(open_)
    for _ in range(max_rounds):
        at = open_.nonzero().flatten()
        if len(at) == 0:
            break
        candidate = _working_sets(y[at], W, c, l2, h[at])
        new_objective, new_gap, still = certify(candidate, at)
        # where rounding or dependent atoms end all progress the token is done, and its gap says so
        open_[at] = still & ((new_gap < gap[at]) | (new_objective < objective[at]))
        # of answers equal to rounding the one solved exactly is the better
        kept = (new_gap <= gap[at] + rounding[at]) | (new_objective < objective[at])
        won = at[kept]
        h[won], objective[won], gap[won] = candidate[kept], new_objective[kept], new_gap[kept]
    return Code(h, objective, gap.clamp_min(0))


@torch.no_grad()
def proximal_steps(y: Tensor, W: Tensor, h: Tensor, *, l1: Tensor, l2: float, n_steps: int) -> Tensor:
    """``n_steps`` steps of proximal gradient descent (ISTA) on P from h, of length one over the gradient's Lipschitz constant.

    P falls with every step, and the code tends to the optimum: an unrolled encoder.

    Args:
        y: As for :func:`solve_coding`, like ``W``, ``l1`` and ``l2``.
        W: Shape (d_sae, d_in).
        h: Where it begins, shape (n, d_sae), ``>= 0``.
        l1: c, shape (d_sae,).
        l2: ``>= 0``.
        n_steps: ``>= 0``.

    Returns:
        The code after them, shape (n, d_sae).

    Source: Daubechies, Defrise & De Mol (2004), Comm. Pure Appl. Math. 57(11).
    """
    step = 1 / (2 * (spectral_norm(W) ** 2 + l2))
    for _ in range(n_steps):
        gradient = 2 * ((h @ W - y) @ W.T + l2 * h)
        h = (h - step * (gradient + l1)).clamp_min(0)
    return h


def _fista(
    y: Tensor,
    W: Tensor,
    c: Tensor,
    l2: float,
    h: Tensor,
    *,
    max_iterations: int,
    tolerance: float,
    floor: Tensor,
) -> Tensor:
    step = 0.5 / (1.01 * spectral_norm(W) ** 2 + l2)
    z, t = h.clone(), torch.ones(len(y), 1, dtype=y.dtype, device=y.device)
    for iteration in range(1, max_iterations + 1):
        gradient = 2 * ((z @ W - y) @ W.T + l2 * z) + c
        new = (z - step * gradient).clamp_min_(0)
        # momentum that points uphill is dropped, token by token
        uphill = ((z - new) * (new - h)).sum(dim=-1, keepdim=True) > 0
        t = torch.where(uphill, 1.0, t)
        t_new = (1 + (1 + 4 * t.square()).sqrt()) / 2
        z = new + torch.where(uphill, 0.0, (t - 1) / t_new) * (new - h)
        h, t = new, t_new
        if iteration % _CHECK_EVERY == 0 or iteration == 1:
            objective, gap = coding_gap_bound(y, W, h, l1=c, l2=l2)
            if (gap <= tolerance * torch.maximum(objective, floor)).all():
                break
    return h


def spectral_norm(W: Tensor, n_iterations: int = 100) -> float:
    """Largest singular value of a matrix.

    Of its smaller Gram matrix, in float64; for a side above 8192, by power iteration.
    """
    if min(W.shape) <= 8192:
        small = W if W.shape[0] <= W.shape[1] else W.T
        gram = torch.zeros(len(small), len(small), dtype=torch.float64, device=W.device)
        for columns in small.split(8192, dim=1):
            part = columns.double()
            gram += part @ part.T
        return float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt())
    v = torch.randn(
        W.shape[1], dtype=W.dtype, device=W.device, generator=torch.Generator(W.device).manual_seed(0)
    )
    for _ in range(n_iterations):
        v = torch.nn.functional.normalize(W.T @ (W @ v), dim=0)
    return float((W @ v).norm())


def _working_sets(y: Tensor, W: Tensor, c: Tensor, l2: float, h: Tensor) -> Tensor:
    """One round: add the worst violators to each token's support and solve exactly on it."""
    violation = 2 * ((y - h @ W) @ W.T - l2 * h) - c
    out = torch.zeros_like(h)
    worst = violation.masked_fill(h > 0, -torch.inf).topk(min(_ADDED_PER_ROUND, h.shape[1]), dim=-1)
    for i in range(len(y)):
        added = worst.indices[i][worst.values[i] > 0]
        chosen = torch.cat([(h[i] > 0).nonzero().flatten(), added])
        out[i].index_copy_(0, chosen, solve_on_support(y[i], W[chosen], c[chosen], l2).to(out.dtype))
    return out


def solve_on_support(y: Tensor, atoms: Tensor, c: Tensor, l2: float) -> Tensor:
    """The optimum for one token over a few atoms, in float64.

    Args:
        y: Shape (d_in,).
        atoms: Shape (k, d_in).
        c: Shape (k,).
        l2: ``>= 0``.

    Returns:
        h on these atoms, shape (k,), float64, ``>= 0``. If they are dependent and ``l2`` is 0, one of the
        optima, found by the proximal point method (a sequence of problems with a ridge, each around the last
        answer).
    """
    D = atoms.double()
    eye = torch.eye(len(D), dtype=D.dtype, device=D.device)
    K, b = D @ D.T + l2 * eye, D @ y.double() - c.double() / 2
    h = torch.zeros_like(b)
    if not (b > 0).any():
        return h
    ridge = 0.0 if _is_well_conditioned(K) else 1e-5 * float(K.diagonal().mean())
    for _ in range(_PROXIMAL_STEPS):
        new = _non_negative(K + ridge * eye, b + ridge * h)
        exact = _on_active(K, b, new > 0)
        if exact is not None and ((b - K @ exact) <= 1e-12 * b.abs().max()).all():
            return exact
        moved, h = float((new - h).norm()), new
        if ridge == 0 or moved <= 1e-15 * float(h.norm()):
            break
    return h


def _is_well_conditioned(K: Tensor) -> bool:
    L, failed = torch.linalg.cholesky_ex(K)
    return not failed and float(L.diagonal().min()) >= 1e-6 * float(L.diagonal().max())


def _non_negative(K: Tensor, b: Tensor) -> Tensor:
    """Minimum of ``h K h - 2 b h`` over ``h >= 0``, as least squares.

    ``||L^T h - L^-1 b||^2`` with ``K = L L^T``.
    """
    L = torch.linalg.cholesky(K)
    target = torch.linalg.solve_triangular(L, b.unsqueeze(1), upper=False).squeeze(1)
    solution, _ = nnls(
        L.T.cpu().numpy(), np.ascontiguousarray(target.cpu().numpy()), maxiter=10 * len(b) + 100
    )
    return torch.from_numpy(solution).to(b)


def _on_active(K: Tensor, b: Tensor, active: Tensor) -> Tensor | None:
    """The stationary point on given atoms, to rounding (nnls stops at a tolerance of its own).

    None if it is not positive or unique.
    """
    part = K[active][:, active]
    if not _is_well_conditioned(part):
        return None
    solution = torch.linalg.solve(part, b[active])
    if not (solution > 0).all():
        return None
    return torch.zeros_like(b).masked_scatter(active, solution)
