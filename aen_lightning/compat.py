"""Every touch of a private name of torch, SAELens, Lightning, transformers or datasets, and of a seam they do not promise.

One function or import a seam. ``tests/test_compat.py`` has a test for each, which fails when the library moves it. Nothing else in
the package may use a name with a leading underscore that is not our own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def adam_tensors_known() -> bool:
    """Whether ``torch.optim.Adam`` gathers its tensors in the way :func:`on_adam_tensors` knows (seen: 2.13)."""
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
