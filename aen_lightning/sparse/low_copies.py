"""Copies of parameters in low precision that an optimizer keeps beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from aen_lightning import compat

_NAME = "aen_low_copy"


def keep_low_copy(parameter: Tensor, copy: Tensor) -> None:
    """Remember ``copy`` as the parameter in low precision, until PyTorch changes the parameter."""
    setattr(parameter, _NAME, (_state_of(parameter), copy))


def low_copy(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The parameter in ``dtype``: itself, or the copy kept of it, or None where there is none that is up to date."""
    if parameter.dtype == dtype:
        return parameter.detach()
    state, copy = getattr(parameter, _NAME, (None, None))
    current = copy is not None and copy.dtype == dtype and state == _state_of(parameter)
    return copy if current else None


def _state_of(parameter: Tensor) -> tuple[int, int]:
    # ``parameter.data = other`` counts as no change
    return compat.version_of(parameter), parameter.data_ptr()
