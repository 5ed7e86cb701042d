"""Goes on from the checkpoint of a run that held the whole SAE in one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aen_lightning.compat import local_slice


@torch.no_grad()
def take_parts_of_whole(
    path: str | Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Copy this rank's parts of weights and moments out of a checkpoint file, which is mapped, not read whole.

    Lightning loads such a file too, but sends each tensor on as it lies in memory, so that one stored feature by
    feature, as the step on the non-zeros stores ``W_enc``, arrives scrambled (torch 2.13, Lightning 2.6).

    Args:
        path: One file, of the same parameters in the same order.
        module: What Lightning calls the model.
        optimizers: Its optimizers, with their state.
    """
    whole = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    for name, parameter in module.named_parameters():
        _take(parameter, whole["state_dict"][name])
    for optimizer, saved in zip(optimizers, whole.get("optimizer_states", ()), strict=False):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, state in saved["state"].items():
            for name, value in state.items():
                _take(optimizer.state[parameters[index]][name], value)


def _take(target: Tensor, whole: Tensor) -> None:
    if isinstance(target, DTensor):
        target.to_local().copy_(whole[local_slice(target)])
