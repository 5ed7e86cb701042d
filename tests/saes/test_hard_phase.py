"""The hard phase of an AEN-SAE against SAELens's BatchTopK, and its export against SAELens's JumpReLU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUSAE,
    TopKSAE,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from torch.testing import assert_close

from aen_lightning import AENTrainingSAE, AENTrainingSAEConfig
from aen_lightning.saes.step_schedule import StepSchedule
from tests.support.training import step_input

K = 3.5


def hardened(**options: Any) -> AENTrainingSAE:
    torch.manual_seed(0)
    sae = AENTrainingSAE(
        AENTrainingSAEConfig(d_in=8, d_sae=40, **{"dtype": "float64", "starvation_guard": 0.1, **options})
    )
    sae.harden(K)
    return sae


def batch(n: int = 0) -> torch.Tensor:
    return torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("sparse_step", ["on", "off"])
def test_a_hard_step_is_saelens_batchtopk_step(sparse_step: str):
    sae = hardened(sparse_step=sparse_step)
    theirs = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(d_in=8, d_sae=40, k=K, dtype="float64", topk_threshold_lr=0.01)
    )
    own = {name: value for name, value in sae.state_dict().items() if name in dict(theirs.named_parameters())}
    theirs.load_state_dict({**theirs.state_dict(), **own})
    for n in range(3):
        ours = sae.training_forward_pass(step_input(batch(n), n, l1=7.0, l2=3.0))
        expected = theirs.training_forward_pass(step_input(batch(n), n))
        assert_close(ours.loss, expected.losses["mse_loss"])
        acts = ours.feature_acts.to_dense() if ours.feature_acts.is_sparse else ours.feature_acts
        theirs_acts = expected.feature_acts
        assert_close(acts, theirs_acts.to_dense() if theirs_acts.is_sparse else theirs_acts)
        assert int((acts > 0).sum()) == int(K * 64)
        for name, parameter in theirs.named_parameters():
            parameter.grad = getattr(sae, name).grad = None
        ours.loss.backward()
        expected.losses["mse_loss"].backward()
        for name, parameter in theirs.named_parameters():
            assert_close(getattr(sae, name).grad, parameter.grad, msg=lambda m, n=name: f"{n}: {m}")
    least = float(acts[acts > 0].min())
    assert sae.hard_threshold.item() == pytest.approx(least, rel=0.2)


@pytest.mark.parametrize("sparse_step", ["on", "off"])
def test_a_hard_topk_step_is_saelens_topk_step(sparse_step: str):
    sae = hardened(sparse_step=sparse_step)
    sae.harden(4, "topk")
    theirs = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=8,
            d_sae=40,
            k=4,
            dtype="float64",
            aux_loss_coefficient=0.0,
            rescale_acts_by_decoder_norm=False,
        )
    )
    own = {name: value for name, value in sae.state_dict().items() if name in dict(theirs.named_parameters())}
    theirs.load_state_dict({**theirs.state_dict(), **own})
    ours = sae.training_forward_pass(step_input(batch(), l1=7.0, l2=3.0))
    expected = theirs.training_forward_pass(step_input(batch()))
    assert_close(ours.loss, expected.loss)
    acts = ours.feature_acts.to_dense() if ours.feature_acts.is_sparse else ours.feature_acts
    assert_close(acts, expected.feature_acts)
    assert int((acts > 0).sum(1).max()) == 4
    ours.loss.backward()
    expected.loss.backward()
    for name, parameter in theirs.named_parameters():
        assert_close(getattr(sae, name).grad, parameter.grad, msg=lambda m, n=name: f"{n}: {m}")
    assert sae.eval().encode(batch(1)).count_nonzero(dim=1).max() == 4
    assert_close(sae.encode(batch(1)), theirs.eval().encode(batch(1)))


@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_topk_finish_is_exported_as_topk_with_the_same_function(tmp_path: Path, scale: float | None):
    sae = hardened(dtype="float32")
    sae.harden(4, "topk")
    sae.training_forward_pass(step_input(batch().float()))
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(40, 1) + 0.5)  # a step that no projection has followed
    x = batch(9).float()
    sae.eval()
    out, acts = sae(x), sae.encode(x)
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
        x, out = x / scale, out / scale
    sae.save_inference_model(tmp_path)
    read = SAE.load_from_disk(tmp_path)
    assert type(read) is TopKSAE
    assert read.cfg.k == 4
    assert_close(read.encode(x), acts, rtol=1e-4, atol=1e-5)
    assert_close(read(x), out, rtol=1e-4, atol=1e-5)
    sae.save_model(tmp_path / "training")
    again = TrainingSAE.load_from_disk(tmp_path / "training")
    assert (again.cfg.hard_k, again.cfg.hard_finish) == (4, "topk")


@pytest.mark.parametrize("sparse_step", ["on", "off"])
@pytest.mark.parametrize("dead", [0, 2, 30])  # fewer and more than d_in / 2
@pytest.mark.parametrize("at_most", [None, 30, 37, 40])
def test_the_auxiliary_loss_is_that_of_saelens(sparse_step: str, dead: int, at_most: int | None):
    sae = hardened(sparse_step=sparse_step, aux_loss_coefficient=0.7)
    theirs = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(d_in=8, d_sae=40, k=K, dtype="float64", aux_loss_coefficient=0.7)
    )
    own = {name: value for name, value in sae.state_dict().items() if name in dict(theirs.named_parameters())}
    theirs.load_state_dict({**theirs.state_dict(), **own})
    given = step_input(batch())
    given.dead_neuron_mask = torch.zeros(40, dtype=torch.bool)
    given.dead_neuron_mask[torch.randperm(40)[:dead]] = True
    ours = sae.scheduled_forward_pass(given, StepSchedule(n_dead_at_most=at_most))
    expected = theirs.training_forward_pass(given)
    name = "auxiliary_reconstruction_loss"
    assert_close(ours.losses[name], expected.losses[name])
    assert bool(ours.losses[name] > 0) == (dead > 0)
    assert_close(ours.loss, expected.loss)
    ours.loss.backward()
    expected.loss.backward()
    for name, parameter in theirs.named_parameters():
        assert_close(getattr(sae, name).grad, parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_a_token_takes_no_more_silent_features_than_asked_for():
    given = step_input(batch())
    given.dead_neuron_mask = torch.arange(40) < 30
    sae = hardened(aux_loss_coefficient=1.0, aux_loss_k=1)
    x = given.sae_in
    output = sae.training_forward_pass(given)
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc)[:, :30]
    best = pre.argmax(dim=1)
    recons = pre.max(dim=1).values[:, None] * sae.W_dec[best]
    error = (recons - (x - output.sae_out)).pow(2).sum(-1).mean()
    assert_close(output.losses["auxiliary_reconstruction_loss"], error)


def test_the_threshold_does_not_lag_where_the_phase_is_short():
    sae = hardened()
    for n in range(60):
        with torch.no_grad():
            sae.W_enc.mul_(1.005)  # activations that grow, as they do once a penalty is gone
        output = sae.training_forward_pass(step_input(batch(n), n))
    acts = output.feature_acts
    least = float((acts.coalesce().values() if acts.is_sparse else acts[acts > 0]).min())
    # a hundredth of the way a step, from the first batch on, would be 15 % below it
    assert sae.hard_threshold.item() == pytest.approx(least, rel=0.06)
    sae.eval()
    l0 = (sae.encode(torch.cat([batch(n) for n in range(100, 120)])) > 0).sum(-1).double().mean()
    assert float(l0) == pytest.approx(K, rel=0.15)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_it_is_exported_as_jumprelu_with_the_same_function(tmp_path: Path, scale: float | None):
    sae = hardened(dtype="float32")
    for n in range(5):
        sae.training_forward_pass(step_input(batch(n).float(), n))
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(40, 1) + 0.5)  # a step that no projection has followed
    x = batch(9).float()
    sae.eval()
    out = sae(x)
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
        x, out = x / scale, out / scale
    sae.save_inference_model(tmp_path)
    read = SAE.load_from_disk(tmp_path)
    assert type(read) is JumpReLUSAE
    assert_close(read(x), out, rtol=1e-4, atol=1e-5)
    assert 1 < (read.encode(x) > 0).sum(-1).float().mean() < 8


def test_a_training_folder_goes_on_hard(tmp_path: Path):
    sae = hardened(dtype="float32")
    sae.training_forward_pass(step_input(batch().float()))
    sae.save_model(tmp_path)
    read = TrainingSAE.load_from_disk(tmp_path)
    assert read.cfg.hard_k == K
    read.save_inference_model(tmp_path / "sae")  # exporting does not change what is trained on
    read.save_model(tmp_path / "again")
    assert TrainingSAE.load_from_disk(tmp_path / "again").cfg.inference_architecture == "standard"
    assert_close(read.hard_threshold, sae.hard_threshold)


@pytest.mark.parametrize("k", [0.0, -1.0, 41.0])
def test_a_k_out_of_range_is_refused(k: float):
    sae = AENTrainingSAE(AENTrainingSAEConfig(d_in=8, d_sae=40))
    with pytest.raises(ValueError, match="k must be above 0 and at most d_sae 40"):
        sae.harden(k)


def test_finishes_that_there_are_not_and_parts_of_features_are_refused():
    sae = AENTrainingSAE(AENTrainingSAEConfig(d_in=8, d_sae=40))
    with pytest.raises(ValueError, match="finish must be one of batchtopk, topk, jumprelu, got 'relu'"):
        sae.harden(4, "relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"k must be a whole number .* got 3.5"):
        sae.harden(3.5, "topk")
    with pytest.raises(ValueError, match=r"hard_finish must be one of batchtopk, topk, jumprelu, got 'relu'"):
        AENTrainingSAEConfig(d_in=8, d_sae=40, hard_finish="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"hard_k must be a whole number .* got 3.5"):
        AENTrainingSAEConfig(d_in=8, d_sae=40, hard_k=3.5, hard_finish="topk")
    with pytest.raises(RuntimeError, match="call prepare_hard_phase"):
        sae.harden(4, "jumprelu")
    with pytest.raises(ValueError, match="hard_k is None"):
        _ = AENTrainingSAEConfig(d_in=8, d_sae=40).k
