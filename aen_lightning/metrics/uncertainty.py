"""Standard errors by the jackknife."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from aen_lightning.compat import compute_again

Estimate = dict[str, float | None]
"""``value`` and ``se``, its standard error (None where it cannot be told)."""


def jackknife(sums: Tensor, statistic: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A statistic of sums over groups, and its standard errors by leaving out one group at a time.

    Args:
        sums: Shape (groups, ...): what each group adds to the sums.
        statistic: From the sums over all groups, shape (...), to any tensor.

    Returns:
        The statistic, and its standard error of the same shape; nan with fewer than two groups. Groups must
        be about equally large and close to independent: here they are runs of whole context rows.

    Source: the delete-a-group jackknife; Efron & Stein (1981), Ann. Stat. 9(3).
    """
    total = sums.sum(dim=0)
    value, n = statistic(total), len(sums)
    if n < 2:
        return value, torch.full_like(value, torch.nan)
    left_out = torch.stack([statistic(total - group) for group in sums])
    return value, ((n - 1) / n * (left_out - left_out.mean(dim=0)).square().sum(dim=0)).sqrt()


def jackknife_metric(groups: Sequence[Metric]) -> Estimate:
    """Value and standard error of a metric whose states are sums, given one copy of it per group of
    tokens."""
    filled = [m for m in groups if m.update_called]
    if not filled:
        return {"value": None, "se": None}
    names = list(filled[0].metric_state)
    states = {name: torch.stack([getattr(m, name) for m in filled]) for name in names}
    probe = copy.deepcopy(filled[0])

    def at(state: dict[str, Tensor]) -> Tensor:
        for name, tensor in state.items():
            setattr(probe, name, tensor)
        return compute_again(probe).double()

    totals = {name: tensor.sum(dim=0) for name, tensor in states.items()}
    value, n = at(totals), len(filled)
    if n < 2:
        return estimate(value, None)
    left_out = torch.stack([at({k: totals[k] - states[k][g] for k in names}) for g in range(n)])
    return estimate(value, ((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt())


def estimate(value: Tensor, se: Tensor | None) -> Estimate:
    """``{"value", "se"}`` of plain numbers; None for what is not finite."""
    return {"value": finite(value), "se": None if se is None else finite(se)}


def finite(value: Tensor | float) -> float | None:
    """A plain number that JSON can hold, None for nan and infinity."""
    number = float(value)
    return number if torch.isfinite(torch.tensor(number)) else None
