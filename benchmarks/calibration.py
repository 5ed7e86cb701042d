"""The same L0 for every dictionary that has a threshold."""

from __future__ import annotations

from typing import Any

import torch

from aen_lightning.evaluate.dictionary import scaled_space, to_scaled_space


@torch.no_grad()
def calibrate(sae: Any, x: torch.Tensor, l0: float) -> float:
    """Rescale the thresholds of a dictionary by one factor, so that its L0 on ``x`` is ``l0``.

    Args:
        sae: From ``load_dictionary``; without thresholds it stays as it is.
        x: Raw activations (tokens, d_in).
        l0: Mean active features per token.

    Returns:
        The factor.
    """
    if not isinstance(getattr(sae, "threshold", None), torch.Tensor):
        return 1.0
    learned = sae.threshold.clone()
    sae.threshold.data.zero_()
    parts = to_scaled_space(sae, x).split(2048)
    with scaled_space(sae):
        ratios = torch.cat([(sae.encode(part) / learned).flatten() for part in parts])
    factor = ratios.topk(round(l0 * len(x)), sorted=False).values.min().item()
    sae.threshold.data.copy_(learned * factor)
    return factor
