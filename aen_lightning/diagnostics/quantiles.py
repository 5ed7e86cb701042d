"""Numbers that describe a distribution, for JSON."""

from __future__ import annotations

import torch
from torch import Tensor

from aen_lightning.metrics import finite

Summary = dict[str, float | None]


def summarize(values: Tensor) -> Summary:
    """Mean, minimum, 10th, 50th and 90th percentile and maximum; None where not finite or if there are no
    values.

    Percentiles are those of the sorted values without interpolation, so that an infinite one stays honest.
    """
    values = values.detach().flatten().double().cpu()
    names = ("min", "p10", "p50", "p90", "max")
    if values.numel() == 0:
        return dict.fromkeys(("mean", *names))
    ordered, last = values.sort().values, values.numel() - 1
    at = torch.tensor([0, 0.1 * last, 0.5 * last, 0.9 * last, last]).round().long()
    return {
        "mean": finite(values.mean()),
        **{name: finite(v) for name, v in zip(names, ordered[at].tolist(), strict=True)},
    }
