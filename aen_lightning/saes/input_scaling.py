"""How activations are scaled before an SAE sees them, and how that scaling leaves with the exported
dictionary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

ScalingKind = Literal["none", "per_token", "average"]


@dataclass(frozen=True)
class InputScaling:
    """Scaling that a data module applies to activations, measured in the units the SAE trains in.

    Training on scaled activations measures the loss in scaled space, as the paper does; SAELens's own
    run-time normalisation measures it after unscaling, which is another objective.

    Args:
        kind: ``none``; ``per_token``: ``x * sqrt(d_in) / ||x||`` (paper, section 4), undone at inference by
            SAELens's ``constant_norm_rescale``; ``average``: ``x * factor``, folded into the weights on
            export.
        factor: For ``average`` only: ``sqrt(d_in) / mean ||x||``, dimensionless, positive.

    Raises:
        ValueError: For an unknown kind, or a factor that is missing, superfluous or not positive.
    """

    kind: ScalingKind = "none"
    factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("none", "per_token", "average"):
            raise ValueError(f"input scaling must be 'none', 'per_token' or 'average', got {self.kind!r}")
        if self.kind != "average" and self.factor is not None:
            raise ValueError(f"input scaling {self.kind!r} takes no factor, got {self.factor}")
        if self.kind == "average" and not (
            self.factor is not None and math.isfinite(self.factor) and self.factor > 0
        ):
            raise ValueError(f"input scaling 'average' needs a positive finite factor, got {self.factor}")

    def __call__(self, x: Tensor) -> Tensor:
        """Scale activations of shape (..., d_in). A zero vector stays zero."""
        if self.kind == "per_token":
            norm = x.norm(dim=-1, keepdim=True)
            return x * (math.sqrt(x.shape[-1]) / norm.clamp_min(1e-12))
        if self.kind == "average":
            return x * self.factor  # type: ignore[operator]  # checked in __post_init__
        return x
