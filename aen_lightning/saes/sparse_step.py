"""Whether an SAE's step can be computed on the non-zeros of its code."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from aen_lightning import sparse
from aen_lightning.saes.aen_config import AENTrainingSAEConfig
from aen_lightning.sparse import backend


class SparseStep:
    """Mixin for a SAELens training SAE whose step :mod:`aen_lightning.sparse` can take."""

    cfg: AENTrainingSAEConfig
    W_enc: nn.Parameter
    dtype: torch.dtype
    hook_dict: dict[str, Any]
    density_switch: sparse.DensitySwitch

    def sparse_step_applies(self) -> bool:
        """Whether the present configuration can take the step on the non-zeros.

        It then does once the code is sparse.
        """
        if not self.own_step_applies():
            return False
        device = self.W_enc.device
        on_this_device = self.cfg.sparse_step == "on" or device.type == "cpu"
        return on_this_device or (self.dtype == torch.float32 and backend.triton_serves(device))

    def own_step_applies(self) -> bool:
        """Whether the step can be that of :mod:`aen_lightning.sparse`, dense or on the non-zeros, and not
        autograd's.
        """
        return (
            self.cfg.sparse_step != "off"
            and self.dtype in (torch.float32, torch.float64)
            # these two act inside the SAE; every other normalisation is outside it
            and self.cfg.normalize_activations not in ("constant_norm_rescale", "layer_norm")
            and not torch.compiler.is_compiling()
            # a hook wants to see, or change, the dense activations
            and not any(point.fwd_hooks or point.bwd_hooks for point in self.hook_dict.values())
        )
