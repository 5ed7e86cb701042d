from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sae_lens import SAE, JumpReLUSAE, TopKSAE

from aen_lightning import SAEModule
from aen_lightning.callbacks import HardFinish
from tests.support.streams import batch_at, loader
from tests.support.training import make_trainer


def module(seed: int = 0) -> SAEModule:
    torch.manual_seed(seed)
    sae = {"architecture": "aen", "d_in": 16, "d_sae": 48, "l1_coefficient": 0.1, "starvation_guard": 0.1}
    return SAEModule(sae)


class L0(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.seen.append(float(outputs["n_firings"][""].sum() / outputs["n_tokens"]))


FINISHES = pytest.mark.parametrize(
    ("finish", "architecture"), [("batchtopk", JumpReLUSAE), ("topk", TopKSAE), ("jumprelu", JumpReLUSAE)]
)


@FINISHES
def test_l0_is_k_from_the_share_of_the_run_on_and_the_dictionary_is_a_plain_one(
    tmp_path: Path, finish: Any, architecture: type[SAE[Any]]
):
    trained, l0 = module(), L0()
    make_trainer(tmp_path, 40, callbacks=[HardFinish(4, at=0.25, finish=finish), l0]).fit(trained, loader())
    assert l0.seen[9] > 8  # the last soft step
    assert l0.seen[10:] == [4.0] * 30
    read = SAE.load_from_disk(trained.export(tmp_path / "sae"))
    assert type(read) is architecture
    x = batch_at(500, batch_size=256, d_in=16)
    trained.eval()
    torch.testing.assert_close(read(x), trained.sae(x), rtol=1e-4, atol=1e-5)


@FINISHES
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, finish: Any, architecture: type[SAE[Any]]
):
    whole, resumed = module(), module(seed=5)
    make_trainer(tmp_path, 40, callbacks=[HardFinish(4, at=0.25, finish=finish)]).fit(whole, loader())
    checkpoint = ModelCheckpoint(tmp_path, filename="at20", every_n_train_steps=20, save_top_k=-1)
    callbacks = [checkpoint, HardFinish(4, at=0.25, finish=finish)]
    make_trainer(tmp_path, 40, enable_checkpointing=True, callbacks=callbacks).fit(module(), loader())
    again = make_trainer(tmp_path, 40, callbacks=[HardFinish(4, at=0.25, finish=finish)])
    again.fit(resumed, loader(start=20), ckpt_path=tmp_path / "at20.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    # a checkpoint read without its run knows that it is hard
    read = SAEModule.load_from_checkpoint(tmp_path / "at20.ckpt", weights_only=True)
    assert type(SAE.load_from_disk(read.export(tmp_path / "read"))) is architecture


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 0}, "HardFinish.k must be above 0, got 0"),
        (
            {"k": 4, "finish": "relu"},
            "HardFinish.finish must be one of batchtopk, topk, jumprelu, got 'relu'",
        ),
        ({"k": 4.5, "finish": "topk"}, "HardFinish.k must be a whole number .* got 4.5"),
        ({"k": 4, "at": 0}, "HardFinish.at must be an integer number of steps >= 1, .* got 0"),
        ({"k": 4, "at": 1.0}, "HardFinish.at must be an integer .* got 1.0"),
    ],
)
def test_values_out_of_range_are_named(kwargs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        HardFinish(**kwargs)


def test_more_features_than_there_are_is_refused_before_any_work(tmp_path: Path):
    with pytest.raises(ValueError, match=r"HardFinish\.k is 64, but the SAE has d_sae=48 features"):
        make_trainer(tmp_path, 4, callbacks=[HardFinish(64)]).fit(module(), loader())
