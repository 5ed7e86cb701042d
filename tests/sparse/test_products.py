"""Sparse products by another route."""

from __future__ import annotations

import pytest
from torch.testing import assert_close

from aen_lightning import sparse
from tests.support.sparse_problem import encode, gradients, make_batch, make_parameters


def test_products_in_columns_equal_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    p = make_parameters(150, 64, bias=0.0)
    x = make_batch(80, 150)
    whole = sparse.loss(x, encode(x, p), **p)
    whole_grads = gradients(whole.loss, p)
    monkeypatch.setattr("aen_lightning.sparse.products._CACHE_BYTES", 0)
    columns = sparse.loss(x, encode(x, p), **p)
    assert_close(columns.sae_out, whole.sae_out)
    for name, grad in gradients(columns.loss, p).items():
        assert_close(grad, whole_grads[name])
