"""The precision of float32 products on CUDA, whichever of PyTorch's two interfaces has set it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

MatmulPrecision = Literal["highest", "high", "medium"]


def tf32_products() -> bool:
    """Whether float32 products on CUDA run in TF32.

    ``allow_tf32`` raises once a program has set ``torch.backends.cuda.matmul.fp32_precision``.
    """
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9
        return str(matmul.fp32_precision) == "tf32"
    return bool(matmul.allow_tf32)


def set_matmul_precision(precision: MatmulPrecision) -> Callable[[], None]:
    """``torch.set_float32_matmul_precision``; the result, when called, sets what was there before."""
    matmul = torch.backends.cuda.matmul
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer interface, which the older one cannot read
        new = matmul.fp32_precision

        def restore() -> None:
            matmul.fp32_precision = new

    else:

        def restore() -> None:
            torch.set_float32_matmul_precision(before)

    torch.set_float32_matmul_precision(precision)
    return restore


@contextmanager
def full_sums(device: torch.device) -> Iterator[None]:
    """Within it, bfloat16 products on CUDA add up in float32 throughout, split sums included."""
    matmul = torch.backends.cuda.matmul
    if device.type != "cuda" or not matmul.allow_bf16_reduced_precision_reduction:
        yield
        return
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = True
