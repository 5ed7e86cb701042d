from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from aen_lightning import SAEModule
from aen_lightning.callbacks import DelayedWarmup
from aen_lightning.saes.lengths import check_length, in_steps
from tests.support.streams import loader
from tests.support.training import make_trainer, step_input


@pytest.mark.parametrize(
    ("value", "steps"), [(0, 0), (1, 1), (70, 70), (0.25, 100), (0.3333, 133), (0.0001, 1), (-5, -5)]
)
def test_integers_are_steps_and_fractions_are_shares(value: float, steps: int):
    assert in_steps(value, 400, "delay") == steps


@pytest.mark.parametrize("value", [1.0, 0.0, 200.0, -0.5, True, "0.2", None, float("nan")])
def test_what_could_be_meant_either_way_is_refused(value: Any):
    with pytest.raises(ValueError, match=r"delay must be an integer number of steps >= 0, or a share .* got"):
        check_length(value, "delay")


@pytest.mark.parametrize("run_steps", [None, float("inf"), -1])
def test_a_share_of_a_run_without_an_end_is_refused(run_steps: float | None):
    with pytest.raises(ValueError, match=r"delay=0.2 is a share of the run.*set trainer.max_steps"):
        in_steps(0.2, run_steps, "delay")


class Seen(pl.Callback):
    def __init__(self) -> None:
        self.ramps: list[float] = []
        self.l1: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.ramps.append(float(module.sae.ramp))
        self.l1.append(float(module.tracked[0].coefficients(trainer.global_step)["l1"]))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def train(tmp_path: Path, lengths: dict[str, Any], **rates: Any) -> tuple[Seen, torch.Tensor]:
    sae = {"architecture": "aen", "d_in": 16, "d_sae": 48, "l1_coefficient": 0.1, **lengths}
    module, seen = SAEModule(sae, seed=0, **rates), Seen()
    make_trainer(tmp_path, 40, callbacks=[seen]).fit(module, loader())
    return seen, module.sae.W_dec.detach()


def test_a_run_in_shares_is_the_run_in_steps(tmp_path: Path):
    shares, W_dec = train(
        tmp_path,
        {"warmup_delay_steps": 0.25, "warmup_ramp_steps": 0.5, "l1_warmup_steps": 0.1},
        lr_warm_up_steps=0.1,
        lr_decay_steps=0.2,
        dead_feature_window=0.5,
    )
    steps, expected = train(
        tmp_path,
        {"warmup_delay_steps": 10, "warmup_ramp_steps": 20, "l1_warmup_steps": 4},
        lr_warm_up_steps=4,
        lr_decay_steps=8,
        dead_feature_window=20,
    )
    assert (shares.ramps, shares.l1, shares.rates) == (steps.ramps, steps.l1, steps.rates)
    assert len(set(shares.ramps)) > 10
    assert torch.equal(W_dec, expected)


def test_a_callback_takes_shares_too(tmp_path: Path):
    seen = Seen()
    module = SAEModule({"architecture": "aen", "d_in": 16, "d_sae": 48}, seed=0)
    callbacks = [DelayedWarmup(delay_steps=0.25, ramp_steps=0.5), seen]
    make_trainer(tmp_path, 40, callbacks=callbacks).fit(module, loader())
    assert seen.ramps[:10] == [0.0] * 10
    assert seen.ramps[10] == pytest.approx(1 / 20)


def test_saelens_own_warm_up_may_be_a_share(tmp_path: Path):
    sae = {"architecture": "standard", "d_in": 16, "d_sae": 48, "l1_warm_up_steps": 0.5}
    module = SAEModule(sae, seed=0)
    make_trainer(tmp_path, 40).fit(module, loader())
    assert module.tracked[0].coefficients(10)["l1"] == pytest.approx(0.5)


def test_a_share_under_a_trainer_that_knows_no_end_is_refused():
    module = SAEModule({"architecture": "aen", "d_in": 16, "d_sae": 48, "l1_warmup_steps": 0.5})
    with pytest.raises(ValueError, match=r"l1_warmup_steps=0\.5 is a share of the run"):
        module.sae.training_forward_pass(step_input(torch.randn(4, 16)))
