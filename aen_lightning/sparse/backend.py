"""Which devices the Triton kernels serve."""

from __future__ import annotations

import importlib.util
import warnings

import torch

_working: dict[int, bool] = {}


def triton_serves(device: torch.device) -> bool:
    """Whether the Triton kernels of this package run what is on ``device``.

    On each GPU they first solve a small problem, and serve only if they solve it right; else a warning says what
    went wrong, and PyTorch's operators do the work.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _working:
        _working[index] = True  # for the small problem
        _working[index] = _solve_a_small_problem(torch.device("cuda", index))
    return _working[index]


def _solve_a_small_problem(device: torch.device) -> bool:
    from aen_lightning.sparse.self_check import check_kernels

    try:
        check_kernels(device)
    except Exception as error:  # noqa: BLE001  # whatever a compiler may raise
        warnings.warn(
            f"the Triton kernels do not work on {torch.cuda.get_device_name(device)}, so that PyTorch's operators "
            f"do their work, more slowly: {type(error).__name__}: {error}",
            stacklevel=3,
        )
        return False
    return True
