"""Every touch of a private name of torch, SAELens, Lightning, transformers or datasets, and of a seam they do
not promise.

One function or import a seam. ``tests/test_compat.py`` has a test for each, which fails when the library
moves it. Nothing else in the package may use a name with a leading underscore that is not our own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from signal import Signals

    from datasets import Dataset
    from lightning.pytorch import Trainer
    from torch.distributed.tensor import DTensor
    from torchmetrics import Metric
    from transformers import PreTrainedModel

M = TypeVar("M", bound=nn.Module)


class FullPrecisionBuffers:
    """Mixin of a module whose ``full_precision_buffers`` stay float32 when it is cast to half precision.

    ``Module.to(bfloat16)`` casts floating-point buffers as well; running statistics must keep their
    precision. torch has no public hook for it: every cast and move goes through ``Module._apply``.
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
    """Whether ``torch.optim.Adam`` gathers its tensors in the way :func:`on_adam_tensors` knows (torch 2.6 to
    2.13).
    """
    import inspect

    import torch

    gather = getattr(torch.optim.Adam, "_init_group", None)
    known = [
        "self",
        "group",
        "params_with_grad",
        "grads",
        "exp_avgs",
        "exp_avg_sqs",
        "max_exp_avg_sqs",
        "state_steps",
    ]
    return gather is not None and list(inspect.signature(gather).parameters) == known


def on_adam_tensors(optimizer: Any, change: Callable[[dict[str, Any], tuple[list[Any], ...]], None]) -> None:
    """Call ``change`` with the tensors that each step of an Adam hands to its kernel, to exchange views in
    place.

    Args:
        optimizer: A ``torch.optim.Adam``. A second call replaces the first one's ``change``.
        change: Gets a parameter group and five lists, one entry a parameter with a gradient: parameters,
            gradients, first and second moments, greatest second moments (empty without ``amsgrad``).
    """
    gather = type(optimizer)._init_group

    def gather_and_change(group: dict[str, Any], *lists: list[Any]) -> bool:
        has_complex: bool = gather(optimizer, group, *lists)
        change(group, lists[:-1])
        return has_complex

    optimizer._init_group = gather_and_change


def version_of(tensor: Tensor) -> int:
    """How often PyTorch has changed a tensor in place, which it counts for autograd and shows nowhere else."""
    return tensor._version


def with_own_children(module: M) -> M:
    """A shallow copy with the same children, of which some can then be exchanged without the original's
    noticing.

    ``copy.copy`` shares the table of children, which has no public name.
    """
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    return clone


def local_slice(tensor: DTensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this rank holds.

    torch says it in one place only, and that is in a private module.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def initialize(model: PreTrainedModel, module: nn.Module) -> None:
    """Give a module of a transformers model its first values, computed buffers (rotary frequencies, ...)
    among them.

    The public ``init_weights`` takes the whole model only, weights and all.
    """
    model._init_weights(module)


def find_in_repository(model_name: str, file: str, **where: Any) -> Path | None:
    """A file of a Hub repository, fetched if need be, or of a folder; None if it is not there.

    The public ``cached_file`` raises the same ``OSError`` for a file that does not exist and for a Hub that
    does not answer.

    Args:
        model_name: Hub name or folder.
        file: Its name.
        where: As for ``transformers.utils.cached_file``: ``revision``, ``token``, ...
    """
    from transformers.utils import cached_file

    found = cached_file(model_name, file, _raise_exceptions_for_missing_entries=False, **where)
    return None if found is None else Path(found)


def is_index_into_other_rows(dataset: Dataset) -> bool:
    """Whether a dataset lists rows of another, so that its table is not its content.

    Datasets does not say so in public.
    """
    return dataset._indices is not None


def consolidate_saelens_shards(pieces: Path, target: Path) -> None:
    """Make one dataset at ``target`` of those in the folders of ``pieces``, moving files, as SAELens does for
    its own cache.

    In public it is done only by a run of ``CacheActivationsRunner``.
    """
    from sae_lens.cache_activations_runner import CacheActivationsRunner

    CacheActivationsRunner._consolidate_shards(pieces, target, copy_files=False)


def compute_again(metric: Metric) -> Tensor:
    """The value of a metric whose states were changed from outside.

    Torchmetrics would return the value it gave before.
    """
    metric._computed = None
    value: Tensor = metric.compute()
    return value


def requeue_signal(trainer: Trainer) -> Signals | None:
    """The signal by which SLURM asks for a requeue; None outside of SLURM, or where requeueing is switched off.

    Strategies of one device have no ``cluster_environment`` in public.
    """
    from lightning.fabric.plugins.environments import SLURMEnvironment

    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def exit_at_once(code: int) -> NoReturn:
    """End this process from any of its threads, whatever the others wait for.

    ``os._exit`` is public, its underscore a warning: nothing is flushed or cleaned up.
    """
    import os

    os._exit(code)
