"""The refit as the last phase of a run: the support stays, the fit is that of a refit of what was there before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sae_lens import SAE, JumpReLUSAE

from aen_lightning import SAEModule
from aen_lightning.callbacks import HardFinish, RefitFinish, TargetL0
from aen_lightning.training.refit import RefitModule
from tests.support.streams import batch_at, loader
from tests.support.training import make_trainer

AEN = {"architecture": "aen", "d_in": 16, "d_sae": 48, "l1_coefficient": 0.3, "gamma": 0.0}


def module(seed: int = 0, lr_decay_steps: int = 10, **fields: Any) -> SAEModule:
    torch.manual_seed(seed)
    return SAEModule({**AEN, **fields}, lr_decay_steps=lr_decay_steps)


class ExportAt(pl.Callback):
    """Exports what the first ``step`` steps have made."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            module.export(self.path)


@pytest.mark.parametrize("harden", [False, True])
def test_it_trains_what_a_refit_of_the_exported_dictionary_trains(tmp_path: Path, harden: bool):
    finish = [HardFinish(4, at=15)] if harden else []
    # a refit of its own would have another schedule
    export, trained = ExportAt(tmp_path / "before", 30), module(lr_decay_steps=0)
    make_trainer(tmp_path, 50, callbacks=[export, *finish, RefitFinish(30)]).fit(trained, loader())
    alone = RefitModule(str(tmp_path / "before"))
    make_trainer(tmp_path / "alone", 20).fit(alone, loader(start=30))
    after = SAE.load_from_disk(trained.export(tmp_path / "after"))
    expected = SAE.load_from_disk(alone.export(tmp_path / "expected"))
    before = SAE.load_from_disk(tmp_path / "before")
    assert type(after) is JumpReLUSAE
    x = batch_at(500, batch_size=256, d_in=16)
    torch.testing.assert_close(after(x), expected(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(after.encode(x) > 0, before.encode(x) > 0)
    assert (after(x) - x).pow(2).sum() < (before(x) - x).pow(2).sum()


def test_a_run_resumed_before_or_in_the_refit_ends_where_an_uninterrupted_one_does(tmp_path: Path):
    def callbacks() -> list[pl.Callback]:
        return [TargetL0(6), RefitFinish(at=0.5)]

    whole = module()
    make_trainer(tmp_path, 40, callbacks=callbacks()).fit(whole, loader())
    keep = ModelCheckpoint(tmp_path, filename="at{step}", every_n_train_steps=15, save_top_k=-1)
    make_trainer(tmp_path, 40, enable_checkpointing=True, callbacks=[keep, *callbacks()]).fit(
        module(), loader()
    )
    for step in (15, 30):
        resumed = module(seed=5)
        path = tmp_path / f"atstep={step}.ckpt"
        make_trainer(tmp_path, 40, callbacks=callbacks()).fit(
            resumed, loader(start=step), ckpt_path=path, weights_only=True
        )
        expected = whole.state_dict()
        assert resumed.state_dict().keys() == expected.keys()
        for name, value in resumed.state_dict().items():
            assert torch.equal(value, expected[name]), (step, name)
        reached = resumed.sae.cfg.metadata["reached_l1_coefficient"]
        assert reached == whole.sae.cfg.metadata["reached_l1_coefficient"] > 0
    read = SAEModule.load_from_checkpoint(tmp_path / "atstep=30.ckpt", weights_only=True)
    assert type(SAE.load_from_disk(read.export(tmp_path / "read"))) is JumpReLUSAE


def test_what_cannot_be_refitted_is_refused_before_any_work(tmp_path: Path):
    with pytest.raises(ValueError, match=r"RefitFinish\.at must be .* got 0"):
        RefitFinish(at=0)
    topk = SAEModule({"architecture": "topk", "d_in": 16, "d_sae": 48, "k": 4})
    with pytest.raises(ValueError, match="'topk' is exported as 'topk': remove the callback"):
        make_trainer(tmp_path, 4, callbacks=[RefitFinish()]).fit(topk, loader())
    with pytest.raises(ValueError, match="'aen' is exported as 'topk': remove the callback"):
        make_trainer(tmp_path, 4, callbacks=[RefitFinish(), HardFinish(4, finish="topk")]).fit(
            module(), loader()
        )
    inside = module(normalize_activations="layer_norm")
    with pytest.raises(ValueError, match="does not go with normalize_activations='layer_norm'"):
        make_trainer(tmp_path, 4, callbacks=[RefitFinish()]).fit(inside, loader())
