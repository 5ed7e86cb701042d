"""The Triton kernels, under Triton's interpreter or on a GPU, against dense float64.

They need Triton, which is no dependency: ``make kernels`` fetches it and runs them interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU: set TRITON_INTERPRET=1 to run the kernels interpreted", allow_module_level=True)

from aen_lightning import sparse  # noqa: E402
from aen_lightning.sparse import triton_kernels, triton_step  # noqa: E402
from aen_lightning.sparse.self_check import check_kernels  # noqa: E402
from tests.support.sparse_problem import dense_terms, gradients, make_batch, make_parameters  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    # In this mode PyTorch fills what torch.empty gives with NaN: what a kernel forgets to write shows.
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aen_lightning.sparse.backend.triton_serves", lambda device: True)


def pattern(batch: int, d_sae: int, dtype: torch.dtype) -> Tensor:
    """(d_sae, batch): about a tenth non-zero, with empty features, and one feature that fires on every token."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(d_sae, batch, generator=generator, dtype=torch.float64)
    h = h.abs() * (torch.rand(d_sae, batch, generator=generator) < 0.1)
    h[::3] = 0
    h[d_sae // 2] = 1.5
    return h.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 50])
def test_products(dtype: torch.dtype, batch: int) -> None:
    h, d_in = pattern(batch, 16, dtype), 37
    x = make_batch(batch, d_in).to(DEVICE, dtype)
    W_dec = make_batch(16, d_in, seed=2).to(DEVICE, dtype)
    rows = h.to_sparse_csr()
    offsets, tokens = rows.crow_indices(), rows.col_indices()
    product = triton_kernels.csr_mm(offsets, tokens, rows.values(), x)
    assert_close(product.double(), h.double() @ x.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(product, triton_kernels.csr_mm(offsets, tokens, rows.values(), x))
    dots = triton_kernels.at_entries(offsets, tokens, W_dec, x)
    expected = (W_dec.double() @ x.double().t())[h != 0]
    assert_close(dots.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 50, 64])
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capacity", [10**4, 20])
def test_compaction_fills_what_fits_and_counts_what_does_not(
    batch: int, low: torch.dtype, capacity: int
) -> None:
    z = (pattern(batch, 16, torch.float32) - 0.25).to(low)
    bias = torch.linspace(-0.5, 0.25, 16, device=DEVICE)
    floor = torch.linspace(0, 0.5, 16, device=DEVICE)
    z[1, 0] = float("nan")
    pre = z.float() + bias[:, None]
    kept = ~(pre <= floor[:, None])
    offsets = torch.full((17,), 10**6, device=DEVICE)
    offsets[0] = 0
    tokens, features = (torch.full((capacity + 5,), -1, device=DEVICE) for _ in range(2))
    values = torch.full((capacity + 5,), -1.0, device=DEVICE)
    sums = torch.empty(16, device=DEVICE)
    for start in (0, 6):  # two unequal blocks
        block = slice(start, 6 if start == 0 else 16)
        triton_kernels.compact(
            z[block].contiguous(),
            bias[block],
            floor[block],
            start,
            offsets,
            tokens,
            features,
            values[:capacity],
            sums,
        )
    assert torch.equal(offsets.diff(), kept.sum(dim=1))
    assert_close(sums, pre.where(kept, 0).sum(dim=1), equal_nan=True)  # of all entries
    feature, token = kept.nonzero(as_tuple=True)
    n = min(capacity, len(feature))
    assert torch.equal(features[:n], feature[:n])
    assert torch.equal(tokens[:n], token[:n])
    assert_close(values[:n], pre[kept][:n], equal_nan=True, rtol=0, atol=0)
    assert (tokens[n:] == -1).all()  # nothing beyond the entries, nor beyond the capacity
    assert (features[n:] == -1).all()
    assert (values[n:] == -1).all()


@pytest.mark.usefixtures("kernels_everywhere")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batch_topk"])
@pytest.mark.parametrize("batch", [1, 24])
def test_a_step_by_kernels_equals_dense_autograd(kind: str, batch: int, dtype: torch.dtype) -> None:
    exact = make_parameters(9, 40, bias=-0.5)
    with torch.no_grad():
        exact["b_enc"][::3] = -100.0  # never fires
        exact["b_enc"][1] = 100.0  # fires on every token
    p = {name: torch.nn.Parameter(value.detach().to(DEVICE, dtype)) for name, value in exact.items()}
    x = make_batch(batch, 9)
    weights, threshold = torch.linspace(0.1, 1, 40).double(), torch.full((40,), 0.4).double()

    def keep(z: Tensor, k: int, dim: int) -> Tensor:
        return torch.zeros_like(z).scatter(dim, z.topk(k, dim=dim).indices, 1.0) * torch.relu(z)

    activation: Any = {
        "relu": torch.relu,
        "jumprelu": lambda z: torch.relu(z) * (z > threshold),
        "topk": lambda z: keep(z, 3, 1),
        "batch_topk": lambda z: keep(z.flatten(), 3 * batch, 0).view_as(z),
    }[kind]
    mcp: Any = lambda h: (1 - h / 3).clamp_min(0)  # noqa: E731
    expected = dense_terms(x, exact, weights, 0.2, activation=activation, slope=mcp)
    expected_grads = gradients(sum(expected[:3]), exact)
    encode, extra = {
        "relu": (sparse.encode, {"block_elements": 64}),
        "jumprelu": (sparse.encode, {"threshold": threshold.to(DEVICE)}),
        "topk": (sparse.encode_topk, {"k": 3}),
        "batch_topk": (sparse.encode_batch_topk, {"k": 3}),
    }[kind]
    on_device = x.to(DEVICE, dtype)
    code: Any = encode(on_device, p["W_enc"], p["b_enc"], p["b_dec"], **extra)
    l1_weights = weights.to(DEVICE, dtype)
    out = sparse.loss(
        on_device, code, **p, l1_weights=l1_weights, slopes=mcp(code.values), l2_coefficient=0.2
    )
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for actual, want in zip(out, expected, strict=True):
        assert_close(actual.double().cpu(), want, rtol=tolerance, atol=tolerance)
    for name, grad in gradients(out.loss, p).items():
        scale = expected_grads[name].abs().max().item() + 1
        assert_close(grad.double().cpu(), expected_grads[name], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slopes", [False, True])
def test_backward_of_features_split_into_chunks(dtype: torch.dtype, slopes: bool) -> None:
    batch, d_in, d_sae = 600, 5, 9
    h = pattern(batch, d_sae, dtype)  # one feature fires on all 600 tokens: three chunks
    rows = h.to_sparse_csr()
    n, room = rows.values().numel(), 37
    padding = torch.zeros(room, dtype=torch.int64, device=DEVICE)
    tokens = torch.cat((rows.col_indices(), padding))
    values = torch.cat((rows.values(), padding.to(dtype)))
    table, g, x, l1 = (
        make_batch(m, d_in, seed=s).to(DEVICE, dtype) for s, m in enumerate((d_sae, batch, batch, d_sae))
    )
    slope = make_batch(1, n + room, seed=9)[0].to(DEVICE, dtype)
    l2 = torch.tensor(0.3, dtype=dtype, device=DEVICE)
    arguments = (
        rows.crow_indices(),
        tokens,
        values,
        table,
        g,
        x,
        l1[:, 0].contiguous(),
        slope if slopes else None,
        l2,
    )
    found = triton_step.backward(*arguments)
    on = h != 0
    feature = torch.arange(d_sae, device=DEVICE).repeat_interleave(on.sum(dim=1))
    d = (table.double() @ g.double().t() + 0.3 * h.double())[on]
    d = d + l1[:, 0].double()[feature] * (slope[:n].double() if slopes else 1)
    dense = torch.zeros_like(h, dtype=torch.float64).masked_scatter_(on, d)
    expected = (d, h.double() @ g.double(), dense @ x.double(), dense.sum(dim=1))
    for actual, want in zip((found[0][:n], *found[1:]), expected, strict=True):
        tolerance = (1e-12 if dtype == torch.float64 else 1e-5) * float(want.abs().max())
        assert_close(actual.double(), want, rtol=0, atol=tolerance)
    for actual, again in zip(found, triton_step.backward(*arguments), strict=True):
        assert torch.equal(actual[:n], again[:n])  # bit for bit


@pytest.mark.usefixtures("kernels_everywhere")
def test_kernels_take_whole_blocks_where_screening_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without TF32, and on a CPU with AMX: a screened product is of another precision."""
    monkeypatch.setattr("aen_lightning.sparse.encoding.screening_pays", lambda *_: True)
    p, x = make_parameters(6, 30, bias=-0.5), make_batch(16, 6).to(DEVICE, torch.float32)
    encoder = [x, *(p[name].detach().to(DEVICE, torch.float32) for name in ("W_enc", "b_enc", "b_dec"))]
    pre = (x - encoder[3]) @ encoder[1] + encoder[2]
    kept = sparse.encode_batch_topk(*encoder, k=2, level=torch.zeros((), device=DEVICE), capacity=400)
    assert_close(kept.to_dense().sum(), pre.flatten().topk(32).values.sum())
    assert_close(sparse.encode(*encoder, capacity=400).to_dense(), pre.relu())


@pytest.mark.usefixtures("kernels_everywhere")
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "batch_topk", "gated"])
def test_a_padded_code_gives_what_the_exact_one_gives(kind: str) -> None:
    p, x = make_parameters(6, 30, bias=-0.5), make_batch(16, 6)
    p = {name: torch.nn.Parameter(value.detach().to(DEVICE)) for name, value in p.items()}
    encoder = x.to(DEVICE), p["W_enc"], p["b_enc"], p["b_dec"]
    threshold = torch.full((30,), 0.4, dtype=torch.float64, device=DEVICE) if kind == "jumprelu" else None
    if kind == "batch_topk":
        exact: Any = sparse.encode_batch_topk(*encoder, k=2)
        padded: Any = sparse.encode_batch_topk(*encoder, k=2, level=exact.least * 0.5, capacity=200)
    else:
        exact = sparse.encode(*encoder, threshold=threshold)
        padded = sparse.encode(*encoder, threshold=threshold, capacity=500)
    assert isinstance(padded, sparse.PaddedCode)
    assert not isinstance(exact, sparse.PaddedCode)
    assert padded.nnz == exact.nnz <= padded.capacity
    assert not padded.overflowed
    assert torch.equal(padded.to_dense(), exact.to_dense())
    assert torch.equal(padded.feature_acts().to_dense(), exact.to_dense())
    assert torch.equal(padded.feature_counts, exact.feature_counts)
    assert_close(padded.feature_sums, exact.feature_sums)
    assert torch.equal(padded.least, exact.least)
    losses = []
    for code in (padded, exact):
        weights = torch.linspace(0.1, 1, 30, device=DEVICE).double()
        slopes = (1 - code.values / 3).clamp_min(0)
        common: Any = {"l1_weights": weights, "slopes": slopes, "l2_coefficient": 0.2}
        if kind == "gated":
            heads = torch.full((2, 30), 0.1, dtype=torch.float64, device=DEVICE).unbind()
            out: Any = sparse.gated_loss(
                encoder[0],
                code,
                p["W_enc"],
                p["b_enc"],
                heads[0],
                heads[1] - 0.3,
                p["W_dec"],
                p["b_dec"],
                **common,
            )
            h = out.code.to_dense()
        else:
            out, h = sparse.loss(encoder[0], code, **p, **common), code.to_dense()
        losses.append([out.loss, out.sae_out, h, *gradients(out.loss, p).values()])
    for actual, expected in zip(*losses, strict=True):
        assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("kernels_everywhere")
def test_what_a_padded_code_cannot_hold_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    p, x = make_parameters(6, 30), make_batch(16, 6)
    encoder = [t.detach().to(DEVICE) for t in (x, p["W_enc"], p["b_enc"], p["b_dec"])]
    exact = sparse.encode(*encoder)
    code: Any = sparse.encode(*encoder, capacity=10)
    assert code.overflowed
    assert code.nnz == exact.nnz > 10
    assert torch.equal(code.feature_counts, exact.feature_counts)  # statistics are right
    assert_close(code.feature_sums, exact.feature_sums)
    assert not sparse.encode(*encoder, capacity=exact.nnz).overflowed
    top = sparse.encode_batch_topk(*encoder, k=2)
    for level, capacity in ((top.least * 0, 40), (top.least * 1.5, 400)):  # no room; too high a level
        code = sparse.encode_batch_topk(*encoder, k=2, level=level, capacity=capacity)
        assert code.overflowed
        sparse.loss(encoder[0], code, **p)  # reads nothing past the end


@pytest.mark.usefixtures("kernels_everywhere")
def test_the_problem_that_kernels_must_solve_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    check_kernels(torch.device(DEVICE))
    right = triton_step.backward

    def wrong(*args: Any) -> Any:
        found = right(*args)
        found[2][3, 4] += 0.01 * found[2].abs().max()
        return found

    monkeypatch.setattr(triton_step, "backward", wrong)
    with pytest.raises(RuntimeError, match=r"W_enc is off by \d"):
        check_kernels(torch.device(DEVICE))


@pytest.mark.usefixtures("kernels_everywhere")
def test_a_code_that_overflows_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    p, x = make_parameters(8, 100, dtype=torch.float32), make_batch(30, 8, dtype=torch.float32)
    on_device = [t.detach().to(DEVICE) for t in (x, p["W_enc"], p["b_enc"], p["b_dec"])]
    roomy = sparse.encode(*on_device)
    monkeypatch.setattr("aen_lightning.sparse.encoding._MIN_CAPACITY", 1)
    cramped = sparse.encode(*on_device)
    assert cramped.nnz == roomy.nnz > 30 * 100 // 64
    for name in ("feature_offsets", "tokens", "features", "values"):
        assert torch.equal(getattr(cramped, name), getattr(roomy, name))


@pytest.mark.usefixtures("kernels_everywhere")
def test_no_activation_at_all() -> None:
    p, x = make_parameters(8, 20, bias=-1e3, dtype=torch.float32), make_batch(5, 8, dtype=torch.float32)
    code = sparse.encode(*(t.detach().to(DEVICE) for t in (x, p["W_enc"], p["b_enc"], p["b_dec"])))
    assert code.nnz == 0
    assert not code.feature_counts.any()
