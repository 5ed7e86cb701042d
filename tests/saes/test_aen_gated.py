from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, GatedTrainingSAE, GatedTrainingSAEConfig, JumpReLUSAE, TrainingSAE
from torch.testing import assert_close

from aen_lightning.callbacks import HardFinish, InitializeFromData
from aen_lightning.saes.aen_gated import AENGatedSAE, AENGatedTrainingSAE, AENGatedTrainingSAEConfig
from aen_lightning.training.module import SAEModule
from tests.support.gated_oracle import GatedOracle
from tests.support.streams import batch_at, loader
from tests.support.training import make_trainer, step_input


def make(seed: int = 0, **options: Any) -> AENGatedTrainingSAE:
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "d_in": 12,
        "d_sae": 40,
        "warmup_delay_steps": 0,
        "starvation_guard": 0.9,
        "ema_decay": 0.9,
    }
    return AENGatedTrainingSAE(AENGatedTrainingSAEConfig(**{**fields, **options}))


def moved(sae: AENGatedTrainingSAE) -> AENGatedTrainingSAE:
    """The heads apart, and rows off the sphere."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (sae.r_mag, sae.b_mag, sae.b_gate):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        sae.W_dec.mul_(0.5 + torch.rand(sae.cfg.d_sae, 1, generator=generator))
    return sae


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("penalty", ["l1", "mcp"])
@pytest.mark.parametrize("sparse_step", ["on", "off"])
def test_training_is_the_method_written_out_by_hand(
    apply_b_dec_to_input: bool, penalty: Any, sparse_step: Any
):
    sae = make(
        dtype="float64", penalty=penalty, sparse_step=sparse_step, apply_b_dec_to_input=apply_b_dec_to_input
    )
    oracle, optimizer = GatedOracle(sae, sae.cfg), torch.optim.Adam(sae.parameters(), lr=1e-2)
    was_sparse = False
    for n in range(60):
        x = 2 * torch.randn(32, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) + 0.3
        expected = oracle.step(x, l1=0.4, l2=0.05, lr=1e-2)
        sae.density_switch.sparse = n >= 20  # the first steps dense, whatever the density
        output = sae.training_forward_pass(step_input(x, n, 0.4, 0.05))
        was_sparse |= output.feature_acts.is_sparse
        assert {name: loss.item() for name, loss in output.losses.items()} == pytest.approx(
            expected, rel=1e-10
        )
        assert output.loss.item() == pytest.approx(sum(expected.values()), rel=1e-10)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert was_sparse == (sparse_step == "on")
    assert sae.l1_weights.std() > 0.1
    for name, value in oracle.p.items():
        assert_close(
            getattr(sae, name).detach(), value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert_close(sae.feature_acts_ema, oracle.m, rtol=1e-10, atol=1e-12)


def test_with_a_plain_penalty_it_is_saelens_gated_sae_but_for_the_frozen_decoder():
    sae = make(dtype="float64", starvation_guard=0.0, gamma=0.0, sparse_step="off")
    theirs = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=12, d_sae=40, dtype="float64"))
    own = {name: value for name, value in moved(sae).state_dict().items() if name in theirs.state_dict()}
    theirs.load_state_dict(own)
    sae.normalize_decoder()
    with torch.no_grad():
        theirs.W_dec.copy_(sae.W_dec)
    x = torch.randn(32, 12, dtype=torch.float64)
    ours, expected = (
        sae.training_forward_pass(step_input(x, l2=0.0)),
        theirs.training_forward_pass(step_input(x)),
    )
    assert_close(ours.feature_acts, expected.feature_acts)
    assert_close(ours.loss, expected.loss)


def test_it_starts_as_the_relu_sae_that_aen_starts_as():
    sae = make(seed=3)
    torch.manual_seed(3)
    aen = TrainingSAE.from_dict({"architecture": "aen", "d_in": 12, "d_sae": 40})
    x = torch.randn(16, 12)
    assert torch.equal(sae.encode(x), aen.encode(x))


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_it_is_exported_as_jumprelu_with_the_same_function(tmp_path: Path, apply_b_dec_to_input: bool):
    sae = moved(make(apply_b_dec_to_input=apply_b_dec_to_input))
    with torch.no_grad():
        sae.b_dec.normal_()
    x = torch.randn(64, 12)
    sae.save_inference_model(tmp_path)
    read = SAE.load_from_disk(tmp_path)
    assert type(read) is JumpReLUSAE
    assert_close(read.W_dec.norm(dim=1), torch.ones(40))
    assert_close(read(x), sae(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(read.encode(x) > 0, sae.encode(x) > 0)
    assert (read.threshold > 0).any()
    assert (read.threshold == 0).any()


def test_a_training_folder_goes_on_and_loads_for_inference(tmp_path: Path):
    sae = moved(make())
    sae.training_forward_pass(step_input(torch.randn(16, 12)))
    sae.save_model(tmp_path)
    x = torch.randn(16, 12)
    again, read = TrainingSAE.load_from_disk(tmp_path), SAE.load_from_disk(tmp_path)
    assert isinstance(again, AENGatedTrainingSAE)
    assert isinstance(read, AENGatedSAE)
    assert torch.equal(again(x), sae(x))
    assert_close(read(x), sae(x))
    assert torch.equal(again.firing_rate_ema, sae.firing_rate_ema)


def test_folding_keeps_the_function():
    sae = moved(make(dtype="float64"))
    x = torch.randn(16, 12, dtype=torch.float64)
    before = sae(x)
    sae.fold_W_dec_norm()
    assert_close(sae(x), before)
    assert_close(sae.W_dec.norm(dim=1), torch.ones(40, dtype=torch.float64))
    sae.fold_activation_norm_scaling_factor(0.5)
    assert_close(sae(x / 0.5) * 0.5, before)


def test_under_lightning_it_starts_from_data_and_is_exported(tmp_path: Path):
    fields = {"architecture": "aen_gated", "d_in": 16, "d_sae": 48, "starvation_guard": 0.1}
    module = SAEModule(fields, seed=0)
    make_trainer(tmp_path, 20, callbacks=[InitializeFromData()]).fit(module, loader())
    assert not torch.equal(module.sae.b_gate, module.sae.b_mag)
    read = SAE.load_from_disk(module.export(tmp_path / "sae"))
    x = batch_at(500, batch_size=64, d_in=16)
    assert_close(read(x), module.sae(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("field", "value"), [("hard_k", 4.0), ("aux_loss_coefficient", 0.03)])
def test_settings_of_a_hard_phase_are_refused_rather_than_ignored(field: str, value: float):
    with pytest.raises(ValueError, match=rf"{field} must be .*no hard phase.*, got {value}"):
        make(**{field: value})


def test_a_hard_phase_is_refused_before_any_work(tmp_path: Path):
    module = SAEModule({"architecture": "aen_gated", "d_in": 16, "d_sae": 48})
    with pytest.raises(ValueError, match="architecture 'aen_gated' has no hard phase: remove HardFinish"):
        make_trainer(tmp_path, 4, callbacks=[HardFinish(4)]).fit(module, loader())
    with pytest.raises(ValueError, match="has no hard phase"):
        make().harden(4)


def test_it_is_exported_as_nothing_else():
    with pytest.raises(ValueError, match="inference_architecture must be 'jumprelu', got 'standard'"):
        make(inference_architecture="standard")
