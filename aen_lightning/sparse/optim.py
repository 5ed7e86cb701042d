"""Adam for parameters stored feature by feature."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Adam):
    """``torch.optim.Adam(fused=True)`` that does not copy a transposed parameter to update it.

    PyTorch's fused kernel on CPU takes contiguous memory: it copies a feature-major ``W_enc``, its gradient and both
    moments at every step, which makes the step several times slower. Adam works element by element, so the kernel gets
    the transposed views, which are contiguous. Same numbers, same arguments, same state dict.

    Args:
        params: As for ``torch.optim.Adam``.
        **kwargs: As for ``torch.optim.Adam``; ``fused`` is set.
    Raises:
        ValueError: If ``fused=False`` is asked for.
    """

    def __init__(self, params: Any, **kwargs: Any) -> None:
        if not kwargs.setdefault("fused", True):
            raise ValueError("FusedAdam is fused by definition; use torch.optim.Adam for fused=False")
        if not self.supported():
            raise TypeError(
                f"FusedAdam was written against another torch.optim.Adam than that of torch {torch.__version__}; "
                "use torch.optim.Adam"
            )
        super().__init__(params, **kwargs)

    @classmethod
    def supported(cls) -> bool:
        """Whether this PyTorch's Adam has the inside that this class reaches into; seen with 2.13."""
        theirs = getattr(torch.optim.Adam, "_init_group", None)
        if theirs is None:
            return False
        return list(inspect.signature(theirs).parameters) == list(inspect.signature(cls._init_group).parameters)

    def _init_group(
        self,
        group: dict[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        state_steps: list[Tensor],
    ) -> bool:
        lists = (params_with_grad, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
        has_complex: bool = super()._init_group(group, *lists, state_steps)
        for i, param in enumerate(params_with_grad):
            together = [tensors[i] for tensors in lists if tensors]
            # All or none: the kernel walks the five side by side.
            if not param.is_contiguous() and all(t.ndim == 2 and t.t().is_contiguous() for t in together):
                for tensors in lists:
                    if tensors:
                        tensors[i] = tensors[i].detach().t()
        return has_complex
