"""Every touch of a private name of torch, SAELens, Lightning, transformers or datasets, and of a seam they do not promise.

One function or import a seam. ``tests/test_compat.py`` has a test for each, which fails when the library moves it. Nothing else in
the package may use a name with a leading underscore that is not our own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor


class FullPrecisionBuffers:
    """Mixin of a module whose ``full_precision_buffers`` stay float32 when it is cast to half precision.

    ``Module.to(bfloat16)`` casts floating-point buffers as well; running statistics must keep their precision. torch has no public
    hook for it: every cast and move goes through ``Module._apply``.
    """

    full_precision_buffers: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before: dict[str, Any] = {name: getattr(self, name, None) for name in self.full_precision_buffers}
        super()._apply(fn, recurse)  # type: ignore[misc]  # of the module it is mixed into
        for name, old in before.items():
            new = getattr(self, name, None)
            if old is not None and new is not None and new.dtype in (torch.bfloat16, torch.float16):
                source = new if old.is_meta else old
                setattr(self, name, source.to(device=new.device, dtype=torch.float32))
        return self


def adam_tensors_known() -> bool:
    """Whether ``torch.optim.Adam`` gathers its tensors in the way :func:`on_adam_tensors` knows (torch 2.6 to 2.13)."""
    import inspect

    import torch

    gather = getattr(torch.optim.Adam, "_init_group", None)
    known = ["self", "group", "params_with_grad", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"]
    return gather is not None and list(inspect.signature(gather).parameters) == known


def on_adam_tensors(optimizer: Any, change: Callable[[tuple[list[Any], ...]], None]) -> None:
    """Call ``change`` with the tensors that each step of an Adam hands to its kernel, to exchange views in place.

    Args:
        optimizer: A ``torch.optim.Adam``. A second call replaces the first one's ``change``.
        change: Gets five lists, one entry a parameter with a gradient: parameters, gradients, first and second
            moments, greatest second moments (empty without ``amsgrad``).
    """
    gather = type(optimizer)._init_group

    def gather_and_change(group: dict[str, Any], *lists: list[Any]) -> bool:
        has_complex: bool = gather(optimizer, group, *lists)
        change(lists[:-1])
        return has_complex

    optimizer._init_group = gather_and_change
