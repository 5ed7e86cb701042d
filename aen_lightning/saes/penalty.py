r"""The adaptive elastic net penalty as pure functions (arXiv:2605.05341; notation of SAELens).

The objective, with the adaptive weights u held constant::

    L = mean_b sum_i (x_hat - x)^2  +  l1 * mean_b sum_j u_j h_bj  +  l2 * mean_b sum_j h_bj^2

This is the SAELens form. The paper takes the mean over ``d_in`` in the first term;
:func:`coefficients_from_paper` converts. A gradient clip of c in paper form is a clip of ``c * d_in`` here.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EMA_FLOOR = 1e-5
"""Floor under the running means before a ratio is taken: the paper's eps, in activation units."""


def coefficients_from_paper(*, d_in: int, lambda_1: float, lambda_2: float) -> tuple[float, float]:
    """``(l1_coefficient, l2_coefficient)`` of the SAELens form for the paper's lambdas.

    The paper averages the squared error over ``d_in``, SAELens sums it, so both coefficients grow by
    ``d_in``.

    >>> coefficients_from_paper(d_in=512, lambda_1=0.001, lambda_2=0.0005)
    (0.512, 0.256)
    """
    return d_in * lambda_1, d_in * lambda_2


def coefficients_to_paper(*, d_in: int, l1_coefficient: float, l2_coefficient: float) -> tuple[float, float]:
    """``(lambda_1, lambda_2)`` of the paper: the inverse of :func:`coefficients_from_paper`."""
    return l1_coefficient / d_in, l2_coefficient / d_in


def adaptive_weights(
    ema: Tensor,
    *,
    gamma: float,
    reference_fraction: float,
    weight_min: float,
    weight_max: float,
) -> Tensor:
    r"""Adaptive L1 weights :math:`w_j = \mathrm{clamp}((r / \max(m_j, \epsilon))^\gamma, w_{min}, w_{max})`.

    Features that are weaker than the reference level pay more, stronger ones less.

    Args:
        ema: Running mean m of ``feature_acts`` per feature, shape (d_sae,), activation units, ``>= 0``.
        gamma: Exponent, dimensionless, ``>= 0``. 0 gives weight 1 everywhere (inside the bounds): the plain
            elastic net.
        reference_fraction: Share of features, in (0, 1], whose mean running activation is the reference level
            r. At least one feature counts.
        weight_min: Lower bound, dimensionless.
        weight_max: Upper bound, dimensionless; what a silent feature gets.

    Returns:
        Weights, shape (d_sae,), dimensionless. Multiplying ``ema`` by a constant leaves them unchanged (above
        the floor).

    Raises:
        ValueError: If ``reference_fraction`` is outside (0, 1].

    Source: arXiv:2605.05341, section 3; the adaptive weights of Zou (2006), with running means as pilot
        estimate.
    """
    if not 0 < reference_fraction <= 1:
        raise ValueError(f"reference_fraction must be in (0, 1], got {reference_fraction}")
    floored = ema.clamp_min(EMA_FLOOR)
    n_reference = max(1, int(reference_fraction * ema.numel()))
    reference = floored.topk(n_reference).values.mean()
    return (reference / floored).pow(gamma).clamp(weight_min, weight_max)


def starvation_guard(firing_rates: Tensor, *, fraction: float, minimum: float) -> Tensor:
    r"""Factors :math:`g_j = \mathrm{clamp}(f_j / (\theta \bar f), g_{min}, 1)` on the L1 weights: features
    that hardly fire pay less.

    A running mean of activations confuses rare with weak, so the adaptive weights press hardest on rare
    features, which starve. This lifts the penalty from features that fire far below the average, and from
    those only.

    Args:
        firing_rates: Share of tokens on which each feature fires, f, shape (d_sae,), up to a common factor,
            ``>= 0``.
        fraction: Share theta of the mean rate under which a feature is guarded, ``> 0``.
        minimum: Least factor, in (0, 1]; what a silent feature gets.

    Returns:
        Factors, shape (d_sae,), in [``minimum``, 1]; all 1 while nothing fires at all.

    Source: not in the paper.
    """
    mean = firing_rates.mean()
    guarded = (firing_rates / (fraction * mean)).clamp(minimum, 1)
    return torch.where(mean > 0, guarded, torch.ones_like(firing_rates))


PenaltyName = Literal["l1", "mcp", "scad", "log"]


def penalty_slopes(feature_acts: Tensor, *, penalty: PenaltyName, scale: Tensor, shape: float) -> Tensor:
    r"""Slopes :math:`\phi'(h)` in [0, 1] of a concave penalty, by which each activation's L1 weight is
    multiplied.

    Held constant in the gradient, they make the penalty's local linear approximation: a weighted L1 whose
    weights fall with the activation, so that strong activations shrink less, or not at all. With :math:`\tau`
    the scale and a the shape::

        l1    1
        mcp   (1 - h / (a tau))_+
        scad  1 where h <= tau, then (a tau - h)_+ / ((a - 1) tau)
        log   a tau / (a tau + h)

    Args:
        feature_acts: h, any shape, ``>= 0``, activation units.
        penalty: Which one.
        scale: tau, a scalar, activation units, ``> 0``.
        shape: a, dimensionless, ``> 0``, for scad ``> 1``. The larger, the closer to L1.

    Returns:
        Slopes of the shape of ``feature_acts``, without gradient.

    Source: Zou & Li (2008), Ann. Stat. 36(4) for the approximation; Zhang (2010), Ann. Stat. 38(2) for mcp;
        Fan & Li (2001),
    JASA 96 for scad. Not in the paper.
    """
    h = feature_acts.detach()
    tau = scale.clamp_min(torch.finfo(scale.dtype).tiny)
    if penalty == "mcp":
        return (1 - h / (shape * tau)).clamp_min(0)
    if penalty == "scad":
        return ((shape * tau - h) / ((shape - 1) * tau)).clamp(0, 1)
    if penalty == "log":
        return shape * tau / (shape * tau + h)
    return torch.ones_like(h)


def penalty_concavity(*, penalty: PenaltyName, scale: Tensor, shape: float) -> Tensor:
    r"""The largest :math:`-\phi''(h)` of a penalty, a scalar in inverse activation units.

    Coding stays strongly convex for every dictionary while ``2 l2 > l1 max_j(u_j) penalty_concavity(...)``:
    then the ridge term bends up more than the penalty bends down.

    Args:
        penalty: As for :func:`penalty_slopes`, like all that follow.
        scale: tau.
        shape: a.
    """
    tau = scale.clamp_min(torch.finfo(scale.dtype).tiny)
    if penalty == "l1":
        return torch.zeros_like(tau)
    return 1 / ((shape - 1 if penalty == "scad" else shape) * tau)


def warmup_ramp(n_steps: int, *, delay_steps: int, ramp_steps: int) -> float:
    """How far the adaptive weights have been let in: 0 during the delay, then linearly to 1.

    Args:
        n_steps: Training steps done, counting the present one; the first step is 1.
        delay_steps: Steps with weight 1 everywhere. Zero or less switches the whole warm-up off: the ramp is
            1.
        ramp_steps: Length of the linear rise after the delay, in steps, ``>= 0``. 0 rises at once.

    Returns:
        A number in [0, 1].

    Source: arXiv:2605.05341, section 4 (delay 4 000 or 10 000 steps, rise over 2 000).
    """
    if delay_steps <= 0:
        return 1.0
    if n_steps < delay_steps:
        return 0.0
    if ramp_steps <= 0:
        return 1.0
    return min(1.0, (n_steps - delay_steps) / ramp_steps)


def elastic_net_terms(
    feature_acts: Tensor, l1_weights: Tensor, slopes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The two penalty terms before their coefficients: ``mean_b sum_j u_j s_bj h_bj`` and ``mean_b sum_j
    h_bj^2``.

    Args:
        feature_acts: ``h``, shape (..., d_sae), ``>= 0``. Half precision is summed in float32.
        l1_weights: ``u``, shape (d_sae,); no gradient flows into it.
        slopes: ``s``, shape of ``feature_acts``, from :func:`penalty_slopes`; None: 1.

    Returns:
        Two scalars with gradient to ``feature_acts``.
    """
    h = feature_acts.to(torch.promote_types(feature_acts.dtype, torch.float32))
    weights = l1_weights.detach() if slopes is None else l1_weights.detach() * slopes
    l1 = (h * weights).sum(dim=-1).mean()
    l2 = h.pow(2).sum(dim=-1).mean()
    return l1, l2
