"""The sparse step against dense autograd in float64, SAELens's own SAEs and hand-worked numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor, nn
from torch.testing import assert_close

from aen_lightning import sparse
from aen_lightning.sparse.encoding import _row_topk
from aen_lightning.sparse.screening import screen_features, screen_tokens

F64 = torch.float64
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def make_parameters(
    d_in: int, d_sae: int, *, bias: float = 0.0, seed: int = 0, dtype: torch.dtype = F64
) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    tensors = {
        "W_enc": normal(d_in, d_sae) / d_in**0.5,
        "b_enc": bias + 0.1 * normal(d_sae),
        "W_dec": normal(d_sae, d_in),
        "b_dec": 0.1 * normal(d_in),
    }
    return {name: nn.Parameter(tensor.to(dtype)) for name, tensor in tensors.items()}


def make_batch(batch: int, d_in: int, seed: int = 1, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(batch, d_in, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def dense_terms(
    x: Tensor, p: dict[str, Any], weights: Tensor, l2: float, apply_b_dec_to_input: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The objective as the formula reads, for autograd to differentiate."""
    h = torch.relu((x - p["b_dec"] if apply_b_dec_to_input else x) @ p["W_enc"] + p["b_enc"])
    sae_out = h @ p["W_dec"] + p["b_dec"]
    mse = (sae_out - x).pow(2).sum(dim=-1).mean()
    return mse, (weights * h).sum(dim=-1).mean(), l2 * h.pow(2).sum(dim=-1).mean(), sae_out


def encode(x: Tensor, p: dict[str, Any], *, apply_b_dec_to_input: bool = True, **kwargs: Any) -> sparse.SparseCode:
    return sparse.encode(x, p["W_enc"], p["b_enc"], p["b_dec"] if apply_b_dec_to_input else None, **kwargs)


def gradients(loss: Tensor, p: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))


# --- exactness ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 33),
    d_in=st.integers(1, 17),
    d_sae=st.integers(1, 70),
    bias=st.sampled_from([-100.0, -2.0, -1.0, 0.0, 3.0]),
    l2=st.sampled_from([0.0, 0.3]),
    apply_b_dec=st.booleans(),
    feature_major=st.booleans(),
    dense=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_loss_and_gradients_equal_dense_autograd(
    batch: int,
    d_in: int,
    d_sae: int,
    bias: float,
    l2: float,
    apply_b_dec: bool,
    feature_major: bool,
    dense: bool,
    seed: int,
) -> None:
    p = make_parameters(d_in, d_sae, bias=bias, seed=seed)
    with torch.no_grad():
        p["b_enc"][::3] = -100.0  # dead features
    x = make_batch(batch, d_in, seed + 1)
    x[::4] = p["b_dec"].detach()  # tokens at the origin of the code: empty rows wherever the bias is negative
    weights = torch.rand(d_sae, dtype=F64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    pull = make_batch(batch, d_in, seed + 2)
    expected = dense_terms(x, p, weights, l2, apply_b_dec)
    inputs = [*p.values(), weights]
    # unequal factors, so that no term can stand in for another, and a gradient through the reconstruction
    factors = (1.0, 2.0, 3.0)
    expected_grads = torch.autograd.grad(
        sum(f * t for f, t in zip(factors, expected[:3], strict=True)) + (pull * expected[3]).sum(),
        inputs,
    )
    if feature_major:
        sparse.feature_major_(p["W_enc"])
    if dense:
        code: Any = sparse.encode_dense(x, p["W_enc"], p["b_enc"], p["b_dec"] if apply_b_dec else None)
    else:
        code = encode(x, p, apply_b_dec_to_input=apply_b_dec, block_elements=64)
    out = sparse.loss(x, code, l1_weights=weights, l2_coefficient=l2, apply_b_dec_to_input=apply_b_dec, **p)
    total = sum(f * t for f, t in zip(factors, out[:3], strict=True)) + (pull * out.sae_out).sum()
    actual_grads = torch.autograd.grad(total, inputs)
    for actual, want in zip(out, expected, strict=True):
        assert_close(actual, want, rtol=1e-10, atol=1e-10)
    for actual, want in zip(actual_grads, expected_grads, strict=True):
        assert_close(actual, want, rtol=1e-10, atol=1e-10)
    assert_close(out.loss, sum(expected[:3]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_gradcheck(apply_b_dec: bool) -> None:
    p = make_parameters(5, 9, bias=-0.2)
    x = make_batch(6, 5).requires_grad_()
    weights = torch.rand(9, dtype=F64, generator=torch.Generator().manual_seed(3), requires_grad=True)

    def step(x: Tensor, weights: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        p = dict(zip(NAMES, parameters, strict=True))
        code = encode(x, p, apply_b_dec_to_input=apply_b_dec)
        assert 0 < code.nnz < 6 * 9
        return tuple(
            sparse.loss(x, code, l1_weights=weights, l2_coefficient=0.3, apply_b_dec_to_input=apply_b_dec, **p)
        )

    assert torch.autograd.gradcheck(step, (x, weights, *(p[name] for name in NAMES)))


def test_hand_worked_step() -> None:
    # Two features, two tokens, d_in 1. pre = [[2, -1], [-1, 3]]: one active feature each, h = 2 and 3.
    p = {
        "W_enc": torch.tensor([[1.0, -2.0]], dtype=F64, requires_grad=True),
        "b_enc": torch.tensor([1.0, 1.0], dtype=F64, requires_grad=True),
        "W_dec": torch.tensor([[1.0], [-1.0]], dtype=F64, requires_grad=True),
        "b_dec": torch.zeros(1, dtype=F64, requires_grad=True),
    }
    x = torch.tensor([[1.0], [-1.0]], dtype=F64)
    p["b_enc"].data = torch.tensor([1.0, 1.0], dtype=F64)
    code = encode(x, p)
    assert code.tokens.tolist() == [0, 1]
    assert code.features.tolist() == [0, 1]
    assert code.values.tolist() == [2.0, 3.0]
    out = sparse.loss(x, code, l1_weights=torch.tensor([0.5, 2.0], dtype=F64), l2_coefficient=0.1, **p)
    # sae_out = 2, -3; residuals 1, -2; mse (1 + 4) / 2; l1 (0.5 * 2 + 2 * 3) / 2; l2 0.1 * (4 + 9) / 2
    assert [t.item() for t in out[:3]] == pytest.approx([2.5, 3.5, 0.65])
    out.loss.backward()
    # dL/dh = 2 r W_dec / B + u / B + 2 l2 h / B: 1 + .25 + .2 = 1.45 and 2 + 1 + .3 = 3.3
    assert_close(p["b_enc"].grad, torch.tensor([1.45, 3.3], dtype=F64))
    assert_close(p["W_enc"].grad, torch.tensor([[1.45, -3.3]], dtype=F64))
    assert_close(p["W_dec"].grad, torch.tensor([[2.0], [-6.0]], dtype=F64))
    # through the reconstruction: (1 - 2) = -1; through the encoder: -(1 * 1.45 - 2 * 3.3) = 5.15
    assert_close(p["b_dec"].grad, torch.tensor([4.15], dtype=F64))


def test_all_zero_code_trains_the_decoder_bias_only() -> None:
    p = make_parameters(4, 8, bias=-1e3)
    x = make_batch(5, 4)
    code = encode(x, p)
    assert code.nnz == 0
    assert code.l0.item() == 0
    out = sparse.loss(x, code, l1_weights=torch.ones(8, dtype=F64), l2_coefficient=1.0, **p)
    grads = gradients(out.loss, p)
    assert_close(out.mse_loss, (p["b_dec"] - x).pow(2).sum(dim=-1).mean())
    assert all(not grads[name].any() for name in ("W_enc", "b_enc", "W_dec"))
    assert_close(grads["b_dec"], 2 * (p["b_dec"].detach() - x).mean(dim=0))
    assert code.to_dense().shape == (5, 8)


# --- the code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_code_statistics_and_forms_equal_the_dense_code(apply_b_dec: bool) -> None:
    p = make_parameters(16, 100, bias=-1.0)
    x = make_batch(37, 16)
    h = torch.relu((x - p["b_dec"] if apply_b_dec else x) @ p["W_enc"] + p["b_enc"]).detach()
    code = encode(x, p, apply_b_dec_to_input=apply_b_dec)
    dense = sparse.encode_dense(x, p["W_enc"], p["b_enc"], p["b_dec"] if apply_b_dec else None)
    for c in (code, dense):
        assert_close(c.to_dense(), h)
        assert_close(c.feature_sums, h.sum(dim=0))
        assert torch.equal(c.feature_counts, (h > 0).sum(dim=0))
        assert_close(c.l0, (h > 0).sum(dim=-1).float().mean())
    assert code.nnz == int((h > 0).sum())
    assert code.density == pytest.approx((h > 0).double().mean().item())
    assert_close(code.csr().to_dense(), h)
    acts = code.feature_acts()
    assert acts.is_coalesced()
    assert_close(acts.to_dense(), h)
    rebuilt = torch.sparse_coo_tensor(acts.indices(), acts.values(), acts.shape, check_invariants=True).coalesce()
    assert torch.equal(rebuilt.indices(), acts.indices())  # the order that is_coalesced promised


def test_products_in_columns_equal_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    p = make_parameters(150, 64, bias=0.0)
    x = make_batch(80, 150)
    whole = sparse.loss(x, encode(x, p), **p)
    whole_grads = gradients(whole.loss, p)
    monkeypatch.setattr("aen_lightning.sparse.objective._CACHE_BYTES", 0)
    columns = sparse.loss(x, encode(x, p), **p)
    assert_close(columns.sae_out, whole.sae_out)
    for name, grad in gradients(columns.loss, p).items():
        assert_close(grad, whole_grads[name])


def test_slices_do_not_change_the_code() -> None:
    p = make_parameters(12, 1000, bias=-1.5)
    x = make_batch(40, 12)
    whole = encode(x, p, block_elements=10**9)
    for block_elements in (1, 300 * 40, 512 * 40):
        sliced = encode(x, p, block_elements=block_elements)
        assert torch.equal(sliced.tokens, whole.tokens)
        assert torch.equal(sliced.features, whole.features)
        assert torch.equal(sliced.feature_offsets, whole.feature_offsets)
        assert_close(sliced.values, whole.values)
    topk = [sparse.encode_topk(x.repeat(20, 1), p["W_enc"], p["b_enc"], k=5, block_elements=b) for b in (1, 10**9)]
    assert torch.equal(topk[0].to_dense(), topk[1].to_dense())


@pytest.mark.parametrize("screen", [False, True])
@pytest.mark.parametrize("which", ["x", "W_enc", "b_enc"])
def test_nan_reaches_the_loss(which: str, screen: bool) -> None:
    p = make_parameters(8, 64, bias=-1.0, dtype=torch.float32)
    x = make_batch(16, 8, dtype=torch.float32)
    with torch.no_grad():
        {"x": x, **p}[which].view(-1)[3] = float("nan")
    code = encode(x, p, screen=screen)
    assert sparse.loss(x, code, **p).loss.isnan()


# --- screening ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    d_in=st.integers(1, 200),
    x_scale=st.sampled_from([1e-6, 1.0, 1e4]),
    bias=st.sampled_from([-3.0, -0.5, 0.0, 0.5]),
    seed=st.integers(0, 2**16),
)
def test_screening_bound_is_never_below_the_pre_activation(d_in: int, x_scale: float, bias: float, seed: int) -> None:
    p = make_parameters(d_in, 96, bias=bias, seed=seed, dtype=torch.float32)
    x = x_scale * make_batch(48, d_in, seed + 1, dtype=torch.float32)
    x[0] = 0
    weight = p["W_enc"].detach().t().contiguous()
    b_enc = p["b_enc"].detach() * x_scale
    upper = screen_features(weight, weight.norm(dim=1), b_enc) @ screen_tokens(x).t()
    exact = weight.double() @ x.double().t() + b_enc.double()[:, None]
    assert not ((exact > 0) & (upper <= 0)).any()
    # and it is worth something: well under 5 % of |x| |w| above the truth
    slack = 0.02 * weight.double().norm(dim=1)[:, None] * x.double().norm(dim=1) + 0.02 * exact.abs()
    slack += 1e-3 * b_enc.double().abs()[:, None]
    assert (upper.double() <= exact + slack).all()


def test_screening_bound_holds_where_rounding_is_worst() -> None:
    # Every entry halfway between two bfloat16 numbers, all errors with one sign: the bound must be tight and safe.
    d_in = 64
    x = torch.full((1, d_in), 1 + 2.0**-8 + 2.0**-20)  # rounds up by almost half a unit in the last place
    weight = torch.full((1, d_in), -(1 + 2.0**-8 + 2.0**-20))
    dot = float(x.double() @ weight.double().t())
    for margin in (1e-4, 1e-3, 1e-2):
        bias = torch.tensor([-dot + margin])
        upper = screen_features(weight, weight.norm(dim=1), bias) @ screen_tokens(x).t()
        assert upper.item() > 0


@pytest.mark.parametrize("feature_major", [False, True])
def test_screened_code_equals_the_plain_code(feature_major: bool) -> None:
    p = make_parameters(64, 1024, bias=-2.2, dtype=torch.float32)
    if feature_major:
        sparse.feature_major_(p["W_enc"])
    x = make_batch(256, 64, dtype=torch.float32)
    x[3] *= 1e4  # an attention sink must not spoil the bound of the other tokens
    plain, screened = encode(x, p, screen=False), encode(x, p, screen=True)
    h64 = torch.relu((x.double() - p["b_dec"].double()) @ p["W_enc"].double() + p["b_enc"].double())
    rounding = 1e-6 * x.double().norm(dim=1, keepdim=True)  # of a float32 sum of this size
    for code in (plain, screened):
        assert ((code.to_dense().double() - h64).abs() <= rounding).all()
    assert 0 < screened.density < 0.02  # the screened path, not its fallback
    assert torch.equal(screened.feature_counts, screened.feature_offsets.diff())


def test_screening_falls_back_to_the_full_product_when_most_features_fire() -> None:
    p = make_parameters(16, 64, bias=1.0, dtype=torch.float32)
    x = make_batch(32, 16, dtype=torch.float32)
    assert torch.equal(encode(x, p, screen=True).to_dense(), encode(x, p, screen=False).to_dense())


def test_screening_needs_a_float32_product() -> None:
    p = make_parameters(8, 16)
    with pytest.raises(
        ValueError, match=r"screen=True needs a float32 encoder product, but this one is torch\.float64"
    ):
        encode(make_batch(4, 8), p, screen=True)


# --- SAELens's own SAEs -------------------------------------------------------------------------------------------


def saelens_output(sae: Any, x: Tensor, coefficients: dict[str, float]) -> Any:
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x, coefficients=coefficients, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
    )


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_equals_saelens_standard_training_sae(apply_b_dec: bool) -> None:
    cfg = StandardTrainingSAEConfig(
        d_in=12, d_sae=60, l1_coefficient=0.7, dtype="float64", apply_b_dec_to_input=apply_b_dec
    )
    sae = StandardTrainingSAE(cfg)
    p = make_parameters(12, 60, bias=-1.0)  # decoder rows of unequal norm: their gradient counts
    sae.load_state_dict({name: value.detach() for name, value in p.items()})
    x = make_batch(31, 12)
    expected = saelens_output(sae, x, {"l1": 0.7})
    expected.loss.backward()
    code = encode(x, p, apply_b_dec_to_input=apply_b_dec)
    out = sparse.loss(x, code, l1_weights=0.7 * p["W_dec"].norm(dim=1), apply_b_dec_to_input=apply_b_dec, **p)
    assert_close(out.mse_loss, expected.losses["mse_loss"])
    assert_close(out.l1_loss, expected.losses["l1_loss"])
    assert_close(out.sae_out, expected.sae_out)
    for name, grad in gradients(out.loss, p).items():
        assert_close(grad, getattr(sae, name).grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("k", [1, 4, 50])
def test_equals_saelens_topk_training_sae(rescale: bool, k: int) -> None:
    cfg = TopKTrainingSAEConfig(
        d_in=12, d_sae=96, k=k, dtype="float64", rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=True
    )
    sae = TopKTrainingSAE(cfg)
    p = make_parameters(12, 96)
    sae.load_state_dict({name: value.detach() for name, value in p.items()})
    x = make_batch(31, 12)
    expected = saelens_output(sae, x, {})
    expected.loss.backward()
    norm = p["W_dec"].norm(dim=-1) if rescale else None
    code = sparse.encode_topk(x, p["W_enc"], p["b_enc"], p["b_dec"], k=k, decoder_norm=norm)
    out = sparse.loss(x, code, **p)
    assert_close(code.to_dense(), expected.feature_acts.detach())
    assert_close(code.feature_acts().to_dense(), expected.feature_acts.detach())
    assert_close(code.feature_sums, expected.feature_acts.detach().sum(dim=0))
    assert_close(out.mse_loss, expected.losses["mse_loss"])
    assert_close(out.sae_out, expected.sae_out)
    for name, grad in gradients(out.loss, p).items():
        assert_close(grad, getattr(sae, name).grad, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 9), columns=st.sampled_from([64, 1024, 1600, 1601]), seed=st.integers(0, 2**16))
def test_row_topk_equals_torch_topk(k: int, columns: int, seed: int) -> None:
    ranked = make_batch(7, columns, seed)
    assert torch.equal(_row_topk(ranked, k).sort(dim=1).values, ranked.topk(k, dim=1).indices.sort(dim=1).values)


def test_saelens_trainer_statistics_take_the_sparse_activations() -> None:
    p = make_parameters(8, 40, bias=-1.0)
    x = make_batch(20, 8)
    code = encode(x, p)
    firing = code.feature_acts().bool().float()  # as SAETrainer._train_step does
    assert_close(firing.sum(-2).to_dense(), code.feature_counts.float())


# --- precision, layout, optimizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_makes_the_same_code_as_the_dense_encoder_under_autocast(dtype: torch.dtype) -> None:
    p = make_parameters(32, 200, bias=-1.0, dtype=torch.float32)
    x = make_batch(64, 32, dtype=torch.float32)
    weights = torch.rand(200, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", dtype=dtype):
        h = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
        want = dense_terms(x, p, weights, 0.1)
        code = encode(x, p)
        topk = sparse.encode_topk(x, p["W_enc"], p["b_enc"], p["b_dec"], k=8)
        out = sparse.loss(x, code, l1_weights=weights, l2_coefficient=0.1, **p)
    assert h.dtype == torch.float32  # the bias promotes: so it must here
    assert torch.equal(code.to_dense(), h)
    assert_close(topk.to_dense().sum(dim=1), h.topk(8).values.sum(dim=1), rtol=1e-3, atol=1e-3)
    assert out.loss.dtype == torch.float32
    for actual, expected in zip(out[:3], want[:3], strict=True):
        assert_close(actual, expected.float(), rtol=1e-2, atol=1e-2)
    expected_grads = gradients(want[0] + want[1] + want[2], p)
    for name, grad in gradients(out.loss, p).items():
        assert grad.dtype == torch.float32
        scale = expected_grads[name].abs().max().item()
        assert_close(grad, expected_grads[name], rtol=0, atol=0.02 * scale)


def test_half_precision_batch_is_cast_to_the_parameters() -> None:
    p = make_parameters(8, 32, bias=-1.0, dtype=torch.float32)
    x = make_batch(16, 8).bfloat16()
    out = sparse.loss(x, encode(x, p), **p)
    want = sparse.loss(x.float(), encode(x.float(), p), **p)
    assert_close(out.loss, want.loss, rtol=0, atol=0)


def test_feature_major_parameter_gets_its_gradient_without_a_copy() -> None:
    p = make_parameters(6, 20)
    before = p["W_enc"].detach().clone()
    sparse.feature_major_(p["W_enc"])
    assert torch.equal(p["W_enc"], before)
    x = make_batch(10, 6)
    sparse.loss(x, encode(x, p), **p).loss.backward()
    assert p["W_enc"].grad is not None
    assert p["W_enc"].grad.stride() == p["W_enc"].stride() == (1, 6)


@pytest.mark.parametrize("kwargs", [{}, {"amsgrad": True}, {"weight_decay": 0.1}])
def test_fused_adam_equals_adam_in_either_layout(kwargs: dict[str, Any]) -> None:
    reference = make_parameters(6, 20)
    ours = copy.deepcopy(reference)
    sparse.feature_major_(ours["W_enc"])
    x = make_batch(10, 6)
    optimizers = [
        torch.optim.Adam(reference.values(), lr=1e-2, foreach=False, **kwargs),
        sparse.FusedAdam(ours.values(), lr=1e-2, **kwargs),
    ]
    for _ in range(5):
        for p, optimizer in zip((reference, ours), optimizers, strict=True):
            optimizer.zero_grad()
            sparse.loss(x, encode(x, p), **p).loss.backward()
            optimizer.step()
    for name in NAMES:
        assert_close(ours[name], reference[name], rtol=1e-9, atol=1e-9)
    assert ours["W_enc"].stride() == (1, 6)
    fresh = sparse.FusedAdam(ours.values(), lr=1e-2, **kwargs)
    fresh.load_state_dict(optimizers[1].state_dict())
    assert_close(fresh.state[ours["W_enc"]]["exp_avg"], optimizers[0].state[reference["W_enc"]]["exp_avg"])


def test_a_step_under_torch_compile_equals_eager() -> None:
    p = make_parameters(6, 20, bias=-0.5)
    x = make_batch(10, 6)

    def step(x: Tensor) -> Tensor:
        return 2 * sparse.loss(x, encode(x, p), **p).loss

    assert_close(torch.compile(step, backend="eager")(x), step(x))


def test_training_through_the_switch_follows_the_dense_path() -> None:
    runs = []
    for switching in (True, False):
        p = make_parameters(8, 64, bias=0.0)
        optimizer = sparse.FusedAdam(p.values(), lr=3e-2)
        switch, losses, paths = sparse.DensitySwitch(threshold=0.3, every_n_steps=2), [], []
        for step in range(60):
            x = make_batch(32, 8, seed=step)
            make = sparse.encode if switching and switch.sparse else sparse.encode_dense
            code = make(x, p["W_enc"], p["b_enc"], p["b_dec"])
            switch.observe(code)
            paths.append(isinstance(code, sparse.SparseCode))
            loss = sparse.loss(x, code, l1_weights=torch.full((64,), 3.0, dtype=F64), **p).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append((losses, paths))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-9)
    assert not runs[0][1][0]
    assert runs[0][1][-1]  # it did switch


# --- switch and errors --------------------------------------------------------------------------------------------


def code_of_density(active: int, total: int = 100, *, dense: bool) -> Any:
    values = torch.zeros(10, total // 10)
    values.view(-1)[:active] = 1.0
    if dense:
        return sparse.DenseCode(values)
    x = torch.eye(10)
    code = sparse.encode(x, values - 0.5, torch.zeros(total // 10))
    assert code.nnz == active
    return code


def test_density_switch_counts_dense_codes_every_n_steps_only() -> None:
    switch = sparse.DensitySwitch(threshold=0.1, hysteresis=2.0, every_n_steps=3)
    assert not switch.sparse
    switch.observe(code_of_density(50, dense=True))
    assert not switch.sparse
    for expected in (False, False, True):  # steps 2 and 3 are not counted, step 4 is
        switch.observe(code_of_density(10, dense=True))
        assert switch.sparse is expected
    switch.observe(code_of_density(20, dense=False))  # inside the hysteresis
    assert switch.sparse
    switch.observe(code_of_density(21, dense=False))
    assert not switch.sparse
    switch.observe(code_of_density(5, dense=True))  # back on the dense path: counted at once
    assert switch.sparse
    assert switch.screen is False  # the last sparse code was too dense to screen
    switch.observe(code_of_density(1, dense=False))
    assert switch.screen is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"threshold": 0.0}, r"threshold must be a share of non-zeros in \(0, 1\), got 0.0"),
        ({"hysteresis": 0.5}, "hysteresis must be at least 1, got 0.5"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
    ],
)
def test_density_switch_refuses_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse.DensitySwitch(**kwargs)


def test_errors_name_what_is_wrong() -> None:
    p = make_parameters(4, 8)
    x = make_batch(3, 4)
    with pytest.raises(ValueError, match=r"got \(3, 5\) and \(4, 8\)"):
        encode(make_batch(3, 5), p)
    with pytest.raises(ValueError, match=r"b_enc must be \(d_sae,\) = \(8,\), got \(7,\)"):
        sparse.encode(x, p["W_enc"], p["b_enc"][:7])
    with pytest.raises(ValueError, match=r"b_dec must be \(d_in,\) = \(4,\), got \(3,\)"):
        sparse.encode(x, p["W_enc"], p["b_enc"], p["b_dec"][:3])
    with pytest.raises(ValueError, match="no tokens"):
        encode(x[:0], p)
    with pytest.raises(TypeError, match=r"float32 or float64 parameters, got torch\.bfloat16"):
        sparse.encode(x, p["W_enc"].bfloat16(), p["b_enc"])
    with pytest.raises(ValueError, match="k must be between 1 and d_sae = 8, got 9"):
        sparse.encode_topk(x, p["W_enc"], p["b_enc"], k=9)
    with pytest.raises(ValueError, match=r"the code is \(3, 8\), but x and W_dec make .* = \(2, 8\)"):
        sparse.loss(x[:2], encode(x, p), **p)
    with pytest.raises(ValueError, match=r"l1_weights must be \(d_sae,\) = \(8,\), got \(4,\)"):
        sparse.loss(x, encode(x, p), l1_weights=torch.ones(4), **p)
    rescaled = sparse.encode_topk(x, p["W_enc"], p["b_enc"], p["b_dec"], k=2, decoder_norm=p["W_dec"].norm(dim=1))
    with pytest.raises(ValueError, match="takes no L1 or L2 penalty"):
        sparse.loss(x, rescaled, l2_coefficient=0.1, **p)
    with pytest.raises(ValueError, match="FusedAdam is fused by definition"):
        sparse.FusedAdam(p.values(), fused=False)
