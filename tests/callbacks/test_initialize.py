from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.testing import assert_close

from aen_lightning import SAEModule
from aen_lightning.callbacks import HardFinish, InitializeFromData, TargetL0
from aen_lightning.callbacks.initialize import geometric_median
from tests.support.streams import batch_at, loader
from tests.support.training import make_trainer


class Start(pl.Callback):
    """The SAE as it is at the first step."""

    state: dict[str, torch.Tensor] | None = None

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if self.state is None:
            self.state = {k: v.detach().clone() for k, v in module.sae.state_dict().items()}


@pytest.mark.parametrize(
    "sae", [{"architecture": "aen"}, {"architecture": "topk", "k": 4}, {"architecture": "jumprelu"}]
)
def test_biases_are_those_of_the_first_batch(tmp_path: Path, sae: dict[str, Any]):
    module, start = SAEModule({"d_in": 16, "d_sae": 48, **sae}, seed=0), Start()
    make_trainer(tmp_path, 2, callbacks=[InitializeFromData(active_share=0.125), start]).fit(module, loader())
    x = batch_at(0, batch_size=64, d_in=16)
    assert start.state is not None
    assert_close(start.state["b_dec"], x.mean(0))
    shifted = x - x.mean(0) if module.sae.cfg.apply_b_dec_to_input else x
    pre = shifted @ start.state["W_enc"] + start.state["b_enc"]
    # 8 of 64 tokens, but for the one at the quantile itself, which rounding puts on either side of 0
    assert torch.equal((pre > 1e-6).sum(0), torch.full((48,), 8))


def test_a_resumed_run_is_left_alone(tmp_path: Path):
    module = SAEModule({"architecture": "aen", "d_in": 16, "d_sae": 48})
    trainer = make_trainer(tmp_path, 3)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    start = Start()
    again = SAEModule({"architecture": "aen", "d_in": 16, "d_sae": 48})
    trainer = make_trainer(tmp_path, 5, callbacks=[InitializeFromData(), start])
    trainer.fit(again, loader(start=3), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert start.state is not None
    assert torch.equal(start.state["b_enc"], module.sae.b_enc)
    assert torch.equal(start.state["b_dec"], module.sae.b_dec)


def test_an_architecture_without_the_parameter_is_refused_before_any_work(tmp_path: Path):
    module = SAEModule(
        {"architecture": "matching_pursuit", "d_in": 16, "d_sae": 48, "decoder_init_norm": 1.0}
    )
    with pytest.raises(
        ValueError,
        match="sets b_enc, which architecture 'matching_pursuit' does not have: give active_share: null",
    ):
        make_trainer(tmp_path, 1, callbacks=[InitializeFromData()]).fit(module, loader())


def test_geometric_median_by_hand():
    # of five points, three at the origin: more than half of the weight lies there, so nothing else moves it
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.1], [0.0, 1e6]], dtype=torch.float64)
    assert_close(geometric_median(x), torch.zeros(2, dtype=torch.float64), atol=1e-4, rtol=0)
    symmetric = torch.tensor([[1.0, 0], [-1.0, 0], [0, 3.0], [0, -3.0]], dtype=torch.float64) + 5
    assert_close(geometric_median(symmetric), torch.full((2,), 5.0, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("l0", "share"),
    [(6, 8), (12, 16), (0.1, 1), (1000, 32)],  # of 64 tokens: 6 / 48, 12 / 48, one at least, half at most
)
def test_a_start_with_a_given_l0(tmp_path: Path, l0: float, share: int):
    module, start = SAEModule({"architecture": "aen", "d_in": 16, "d_sae": 48}, seed=0), Start()
    make_trainer(tmp_path, 2, callbacks=[InitializeFromData(l0=l0), start]).fit(module, loader())
    assert start.state is not None
    pre = (batch_at(0, batch_size=64, d_in=16) - start.state["b_dec"]) @ start.state["W_enc"] + start.state[
        "b_enc"
    ]
    assert torch.equal((pre > 1e-6).sum(0), torch.full((48,), share))


def test_a_start_for_the_target_of_the_run(tmp_path: Path):
    """Of 16 dimensions 16 / 6 may be held active, so L0 2 with headroom 2 is held at 2.67, and starts from 4 * 4 / 2.67 = 6."""
    module, start = SAEModule({"architecture": "aen", "d_in": 16, "d_sae": 128}, seed=0), Start()
    callbacks = [
        InitializeFromData(l0="target"), start, TargetL0(2, headroom=2), HardFinish(2, at=1)
    ]  # fmt: skip
    make_trainer(tmp_path, 2, callbacks=callbacks).fit(module, loader())
    assert start.state is not None
    pre = (batch_at(0, batch_size=64, d_in=16) - start.state["b_dec"]) @ start.state["W_enc"] + start.state[
        "b_enc"
    ]
    assert torch.equal((pre > 1e-6).sum(0), torch.full((128,), 3))  # of 64 tokens: 6 / 128


def test_a_start_for_a_target_needs_one(tmp_path: Path):
    module = SAEModule({"architecture": "aen", "d_in": 16, "d_sae": 48}, seed=0)
    with pytest.raises(ValueError, match="l0 is 'target', but the run has no TargetL0"):
        make_trainer(tmp_path, 2, callbacks=[InitializeFromData(l0="target")]).fit(module, loader())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"b_dec": "median"}, {"active_share": 0.0}, {"active_share": 1.0}, {"l0": 0.0}, {"l0": -3}, {"l0": "tagret"},
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(kwargs: dict[str, Any]):
    with pytest.raises(ValueError, match=r"InitializeFromData\.\w+ must be"):
        InitializeFromData(**kwargs)
