"""Precision settings are read and restored whichever interface made them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from aen_lightning.sparse.precision import set_matmul_precision, tf32_products

matmul = torch.backends.cuda.matmul
pytestmark = pytest.mark.skipif(
    not hasattr(matmul, "fp32_precision"), reason="this torch has one interface only"
)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def test_tf32_is_known_under_both_interfaces() -> None:
    torch.set_float32_matmul_precision("high")
    assert tf32_products()
    torch.set_float32_matmul_precision("highest")
    assert not tf32_products()
    matmul.fp32_precision = "tf32"
    assert tf32_products()
    with pytest.raises(RuntimeError):  # what we do not read
        matmul.allow_tf32  # noqa: B018
    matmul.fp32_precision = "ieee"
    assert not tf32_products()


@pytest.mark.parametrize("new_interface", [False, True])
def test_the_precision_before_comes_back(new_interface: bool) -> None:
    if new_interface:
        matmul.fp32_precision = "ieee"
    restore = set_matmul_precision("high")
    assert torch.get_float32_matmul_precision() == "high"
    assert tf32_products()
    restore()
    assert not tf32_products()
