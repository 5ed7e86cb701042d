"""What SAELens expects of any architecture, asked of each of ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from torch import Tensor
from torch.testing import assert_close

from aen_lightning.saes.adaptive import STATE_BUFFERS
from tests.support.training import step_input

D_IN, D_SAE = 12, 30
ARCHITECTURES = ("aen", "aen_gated")


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def make(architecture: str, **fields: Any) -> TrainingSAE[Any]:
    torch.manual_seed(0)
    return TrainingSAE.from_dict(
        {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "starvation_guard": 0.2, **fields}
    )


def moved(sae: TrainingSAE[Any]) -> TrainingSAE[Any]:
    """All parameters off their start, so that nothing is zero or equal by chance."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in sae.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise.to(parameter.dtype))
    return sae


def batch(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D_IN, generator=generator, dtype=torch.float64).to(dtype)


def test_it_is_registered_for_training_and_for_inference(architecture: str):
    sae_class, config_class = get_sae_class(architecture)
    training_class, training_config_class = get_sae_training_class(architecture)
    assert config_class.architecture() == training_config_class.architecture() == architecture
    assert issubclass(sae_class, SAE)
    assert issubclass(training_class, TrainingSAE)


def test_a_config_survives_the_way_through_a_dict(architecture: str):
    cfg = make(architecture, l1_coefficient=0.3).cfg
    again = type(cfg).from_dict(cfg.to_dict())
    assert again.to_dict() == cfg.to_dict()
    assert again.architecture() == architecture


def test_saelens_spelling_of_the_warm_up_is_taken_and_unknown_keys_are_refused(architecture: str):
    assert make(architecture, l1_warm_up_steps=30).get_coefficients()["l1"].warm_up_steps == 30
    with pytest.raises(ValueError, match="say the same: drop one"):
        make(architecture, l1_warm_up_steps=30, l1_warmup_steps=40)
    with pytest.raises(ValueError, match=r"has no field 'l1_coeficient'.*'l1_coefficient'"):
        make(architecture, l1_coeficient=3.0)


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_shapes(architecture: str, shape: tuple[int, ...]):
    sae = make(architecture)
    acts = sae.encode(batch(*shape))
    assert acts.shape == (*shape, D_SAE)
    assert (acts >= 0).all()
    assert sae.decode(acts).shape == (*shape, D_IN)
    assert_close(sae(batch(*shape)), sae.decode(acts))
    output = sae.training_forward_pass(step_input(batch(*shape)))
    assert output.sae_out.shape == (*shape, D_IN)
    assert output.feature_acts.shape == output.hidden_pre.shape == (*shape, D_SAE)


def test_contexts_train_as_their_tokens_do(architecture: str):
    x = batch(4, 6)
    nested, flat = make(architecture), make(architecture)
    losses = [
        sae.training_forward_pass(step_input(data)).loss
        for sae, data in ((nested, x), (flat, x.flatten(end_dim=1)))
    ]
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, one), (_, other) in zip(nested.named_parameters(), flat.named_parameters(), strict=True):
        assert_close(one.grad, other.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_the_loss_is_the_sum_of_its_terms_and_reaches_every_parameter(architecture: str):
    sae = moved(make(architecture))
    output = sae.training_forward_pass(step_input(batch(16)))
    assert_close(output.loss, torch.stack(list(output.losses.values())).sum())
    output.loss.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_steps_make_the_reconstruction_better(architecture: str):
    sae, x = make(architecture), batch(64)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    errors = []
    for n in range(60):
        output = sae.training_forward_pass(step_input(x, n, l1=0.05, l2=0.0))
        errors.append(output.losses["mse_loss"].item())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert errors[-1] < 0.5 * errors[0]


def test_a_tied_start(architecture: str):
    sae = make(architecture, decoder_init_norm=0.1)
    assert_close(sae.W_enc.T, 0.1 * sae.W_dec)


@pytest.mark.parametrize("normalize", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_every_normalisation_trains_and_is_exported(
    architecture: str, normalize: str, apply_b_dec_to_input: bool, tmp_path: Path
):
    sae = moved(
        make(architecture, normalize_activations=normalize, apply_b_dec_to_input=apply_b_dec_to_input)
    )
    x = 3 * batch(16)
    assert torch.isfinite(sae.training_forward_pass(step_input(x)).loss)
    sae.save_inference_model(tmp_path)
    assert_close(SAE.load_from_disk(tmp_path)(x), sae(x), rtol=1e-4, atol=1e-4)


def test_exporting_leaves_the_training_sae_as_it_was(architecture: str, tmp_path: Path):
    sae = moved(make(architecture))
    before = copy.deepcopy(sae.state_dict())
    sae.save_inference_model(tmp_path)
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_training_folder_goes_on_where_it_was(architecture: str, dtype: str, tmp_path: Path):
    sae = moved(make(architecture, dtype=dtype))
    x = batch(16, dtype=sae.dtype)
    for n in range(3):
        sae.training_forward_pass(step_input(x, n))
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert type(again) is type(sae)
    # SAELens's loader casts all it reads to the SAE's dtype, so half precision takes the statistics' last bits
    rounding = 2**-8 if dtype == "bfloat16" else 0.0
    for name, value in sae.state_dict().items():
        exact = rounding if name in STATE_BUFFERS else 0.0
        assert_close(again.state_dict()[name], value, rtol=exact, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    first, second = (one.training_forward_pass(step_input(x, 3)) for one in (sae, again))
    assert_close(first.loss, second.loss, rtol=rounding, atol=0)
    assert (
        SAE.load_from_disk(tmp_path)(x).shape == x.shape
    )  # a checkpoint of SAELens's runner is such a folder


def test_training_goes_on_with_a_guard_that_is_newly_on(architecture: str, tmp_path: Path):
    make(architecture, starvation_guard=0.0).save_model(tmp_path)
    cfg = (tmp_path / "cfg.json").read_text().replace('"starvation_guard": 0.0', '"starvation_guard": 0.3')
    (tmp_path / "cfg.json").write_text(cfg)
    again: Any = TrainingSAE.load_from_disk(tmp_path)
    assert torch.isfinite(again.training_forward_pass(step_input(batch(8))).loss)
    assert again.firing_rate_ema.shape == (D_SAE,)


def test_folding_the_decoder_norm_keeps_the_function(architecture: str):
    sae = moved(make(architecture, dtype="float64"))
    x = batch(16, dtype=torch.float64)
    before = sae(x)
    sae.fold_W_dec_norm()
    assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))
    assert_close(sae(x), before)


def test_folding_a_scale_makes_it_one_for_raw_activations(architecture: str, tmp_path: Path):
    sae = moved(make(architecture, dtype="float64"))
    x = batch(16, dtype=torch.float64)
    before = sae(4 * x)
    sae.fold_activation_norm_scaling_factor(4.0)
    assert_close(sae(x), before / 4)
    sae.save_inference_model(tmp_path)
    assert_close(SAE.load_from_disk(tmp_path)(x), before / 4)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_folding_a_whitening_keeps_the_function(architecture: str, apply_b_dec_to_input: bool):
    sae = moved(make(architecture, dtype="float64", apply_b_dec_to_input=apply_b_dec_to_input))
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(D_IN, generator=generator, dtype=torch.float64)
    matrix = torch.eye(D_IN, dtype=torch.float64) + 0.2 * torch.randn(
        D_IN, D_IN, generator=generator, dtype=torch.float64
    )
    inverse = torch.linalg.inv(matrix)
    x = batch(16, dtype=torch.float64)
    expected = sae((x - mean) @ matrix) @ inverse + mean
    sae.fold_activation_whitening(mean, matrix, inverse)
    assert_close(sae(x), expected)


def test_in_eval_mode_no_state_moves(architecture: str):
    sae = make(architecture).eval()
    before = copy.deepcopy(sae.state_dict())
    sae.training_forward_pass(step_input(batch(16)))
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_coefficients_that_are_not_given_are_the_configs(architecture: str):
    sae, given = make(architecture, l2_coefficient=0.7), step_input(batch(16), l2=0.7)
    with_l2 = sae.training_forward_pass(given).loss
    del given.coefficients["l2"]
    assert torch.equal(make(architecture, l2_coefficient=0.7).training_forward_pass(given).loss, with_l2)


def test_hooks_see_and_change_the_activations(architecture: str):
    sae = moved(make(architecture))
    x = batch(16)
    _, cache = sae.run_with_cache(x)
    assert_close(cache["hook_sae_acts_post"], sae.encode(x))
    assert {"hook_sae_input", "hook_sae_acts_pre", "hook_sae_recons", "hook_sae_output"} <= set(cache)
    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", lambda acts, hook: torch.zeros_like(acts))]):
        assert_close(sae(x), sae.b_dec.expand(16, -1))
        output = sae.training_forward_pass(step_input(x))  # a hook takes the step to the dense path
    assert not output.feature_acts.any()


def test_with_the_error_term_nothing_is_lost(architecture: str):
    sae = moved(make(architecture))
    sae.use_error_term = True
    assert_close(sae(batch(16)), batch(16))


def test_a_cast_reaches_weights_and_spares_the_statistics(architecture: str):
    sae: Any = make(architecture).to(dtype=torch.bfloat16)
    assert sae.W_enc.dtype == sae.dtype == torch.bfloat16
    assert sae.feature_acts_ema.dtype == torch.float32
    assert sae.encode(batch(4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_histograms_are_arrays(architecture: str):
    for name, values in make(architecture).log_histograms().items():
        assert values.ndim >= 1, name
