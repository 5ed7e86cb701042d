from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from aen_lightning import SAEModule
from aen_lightning.callbacks import HardFinish, TargetL0
from aen_lightning.data import SpikedDataModule
from tests.support.streams import loader
from tests.support.training import make_trainer

D_IN, D_SAE = 32, 96


class Record(pl.Callback):
    def __init__(self) -> None:
        self.l0: list[float] = []
        self.multipliers: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.l0.append(float(outputs["n_firings"][""].sum() / outputs["n_tokens"]))
        self.multipliers.append(float(module.sparsity_multipliers[""]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sae",
    [
        {
            "architecture": "aen",
            "gamma": 0.0,
            "l2_coefficient": 0.0,
            "decoder_init_norm": 0.1,
            "l1_coefficient": 0.05,
        },
        {
            "architecture": "aen",
            "gamma": 0.0,
            "l2_coefficient": 0.0,
            "decoder_init_norm": 0.1,
            "l1_coefficient": 2.0,
        },
        {"architecture": "standard"},
        {"architecture": "gated", "l1_coefficient": 0.3},
        {
            "architecture": "aen_gated",
            "gamma": 0.0,
            "l2_coefficient": 0.0,
            "decoder_init_norm": 0.1,
            "l1_coefficient": 0.3,
        },
    ],
    ids=str,
)
def test_from_a_cold_start_it_is_at_the_target_by_two_fifths_of_the_run_and_stays(
    tmp_path: Path, sae: dict[str, Any]
):
    n_steps, target = 1500, 8.0
    record = Record()
    torch.manual_seed(0)
    module = SAEModule({"d_in": D_IN, "d_sae": D_SAE, **sae}, lr_decay_steps=n_steps // 5)
    data = SpikedDataModule(d_in=D_IN, n_features=D_SAE, k=4, rho=0.0, train_batch_size_tokens=256)
    trainer = make_trainer(
        tmp_path,
        n_steps,
        gradient_clip_val=float(D_IN),
        callbacks=[TargetL0(target), record],
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)
    after = torch.tensor(record.l0)[2 * n_steps // 5 :].unfold(0, 50, 50).mean(dim=1)  # means of 50 steps
    assert ((after / target - 1).abs() < 0.05).all(), after
    reached = module.sae.cfg.metadata["reached_l1_coefficient"]
    assert reached == pytest.approx(module.sae.cfg.l1_coefficient * record.multipliers[-1])


@pytest.mark.parametrize(("d_sae", "headroom", "held"), [(48, 1.0, 1.2), (512, 2.0, 2.4), (64, 2.0, 2.0)])
def test_the_multiplier_follows_the_rule_written_out_in_floats(
    tmp_path: Path, d_sae: int, headroom: float, held: float
):
    record, n_steps, target = Record(), 12, 1.2
    module = SAEModule({"architecture": "aen", "d_in": 16, "d_sae": d_sae, "l1_coefficient": 0.1})
    steer = TargetL0(target, reach_at=0.5, gain=0.1, damping=0.7, average_steps=4, headroom=headroom)
    ending = HardFinish(target, at=n_steps)  # no step of this run is hard
    make_trainer(tmp_path, n_steps, callbacks=[steer, record, ending]).fit(module, loader())
    assert module.sae.cfg.metadata["target_l0"] == target
    average, integral = record.l0[0], 0.0
    for step, (l0, multiplier) in enumerate(zip(record.l0, record.multipliers, strict=True), 1):
        average += (l0 - average) / 4
        share = min(1.0, step / 6)
        goal = record.l0[0] ** (1 - share) * held**share
        distance = max(-1.0, min(1.0, math.log(average / goal)))
        integral += 0.1 * distance
        assert multiplier == pytest.approx(math.exp(integral + 0.7 * distance), rel=1e-4)
    assert record.l0[0] > held  # else the path is another


@pytest.mark.parametrize(
    ("d_in", "d_sae", "held", "start"),
    [
        (576, 1024, 32.0, 32.0),
        (576, 960, 30.0, 32 * 32 / 30),
        (576, 768, 24.0, 38.4),  # a 20th of the features, not 42.7
        (576, 512, 16.0, 32.0),
        (576, 64, 16.0, 32.0),  # twice the L0, though it is half of the features
        (120, 1280, 20.0, 51.2),
        (60, 2048, 16.0, 64.0),
    ],
    ids=["2", "1.9", "1.5", "1", "1, dense", "1.25, few dimensions", "1, fewer"],
)
def test_headroom_ends_where_a_32th_of_the_features_or_a_sixth_of_the_dimensions_fires_and_the_start_makes_up_for_it(
    d_in: int, d_sae: int, held: float, start: float
):
    target = TargetL0(16.0, headroom=2.0)
    assert target.held_l0(d_in, d_sae) == held
    assert target.start_l0(d_in, d_sae) == pytest.approx(start)


def test_a_start_without_headroom_is_twice_the_l0():
    assert TargetL0(16.0).start_l0(576, 9216) == 32.0


def test_headroom_without_a_hard_phase_is_refused(tmp_path: Path):
    module = SAEModule({"architecture": "aen", "d_in": 16, "d_sae": 512, "l1_coefficient": 0.1})
    with pytest.raises(
        ValueError, match=r"headroom is 2.0, but nothing brings L0 to 4.0 in the end: add HardFin"
    ):
        make_trainer(tmp_path, 2, callbacks=[TargetL0(4.0, headroom=2.0)]).fit(module, loader())


def test_a_resumed_run_steers_as_an_uninterrupted_one(tmp_path: Path):
    def module() -> SAEModule:
        torch.manual_seed(0)
        return SAEModule({"architecture": "aen", "d_in": 16, "d_sae": 48, "l1_coefficient": 0.1})

    whole = module()
    make_trainer(tmp_path, 40, callbacks=[TargetL0(6.0)]).fit(whole, loader())
    checkpoint = ModelCheckpoint(tmp_path, filename="at20", every_n_train_steps=20, save_top_k=-1)
    first = make_trainer(tmp_path, 40, enable_checkpointing=True, callbacks=[checkpoint, TargetL0(6.0)])
    first.fit(module(), loader())
    resumed = module()
    again = make_trainer(tmp_path, 40, callbacks=[TargetL0(6.0)])
    again.fit(resumed, loader(start=20), ckpt_path=tmp_path / "at20.ckpt", weights_only=True)
    assert whole.sparsity_multipliers[""] != 1
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("sae", "l0", "message"),
    [
        (
            {"architecture": "topk", "k": 4},
            4.0,
            "steers an L1 coefficient, which architecture 'topk' does not have",
        ),
        (
            {"architecture": "jumprelu"},
            4.0,
            "steers an L1 coefficient, which architecture 'jumprelu' does not have",
        ),
        (
            {"architecture": "aen", "l1_coefficient": 0.0},
            4.0,
            "coefficient of architecture 'aen', which is 0",
        ),
        ({"architecture": "aen"}, 64.0, "l0 is 64.0, but architecture 'aen' has d_sae=32 features"),
    ],
)
def test_what_cannot_be_steered_is_refused_before_any_work(
    tmp_path: Path, sae: dict[str, Any], l0: float, message: str
):
    module = SAEModule({"d_in": 16, "d_sae": 32, **sae})
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, 2, callbacks=[TargetL0(l0)]).fit(module, loader())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"l0": 0},
        {"l0": 4, "reach_at": 0},
        {"l0": 4, "gain": 0},
        {"l0": 4, "damping": -1},
        {"l0": 4, "headroom": 0.5},
        {"l0": 4, "headroom": math.inf},
    ],
)
def test_values_out_of_range_are_named(kwargs: dict[str, float]):
    with pytest.raises(ValueError, match=r"TargetL0\.\w+ must be"):
        TargetL0(**kwargs)
