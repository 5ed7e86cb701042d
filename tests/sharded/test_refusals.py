"""What cannot be sharded is refused before any work, with what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

from aen_lightning.callbacks import EvaluateDictionaries, HardFinish, InitializeFromData, ReviveSilent
from aen_lightning.training.module import SAEModule
from aen_lightning.training.sharded_features import refuse_model_parallel
from tests.support.streams import loader
from tests.support.training import SAE_FIELDS, make_trainer

TOPK = {"architecture": "topk", "d_in": 16, "d_sae": 48, "k": 4}


@pytest.mark.parametrize(
    ("sae", "said"),
    [
        (
            {"architecture": "gated", "d_in": 16, "d_sae": 48},
            "aen, topk, batchtopk, not architecture 'gated'",
        ),
        ({**SAE_FIELDS, "sparse_step": "on"}, "sparse_step='on': use 'auto' or 'off'"),
        ({**TOPK, "use_sparse_activations": True}, "use_sparse_activations=True: use false"),
        ({**TOPK, "normalize_activations": "layer_norm"}, "layer_norm.*input_scaling"),
        ({**SAE_FIELDS, "hard_k": 3.0}, "hard_k: leave it out"),
    ],
)
def test_saes_that_cannot_be_sharded(sae: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SAEModule(sae, shard_features=True)


@pytest.mark.parametrize(
    "callback",
    [EvaluateDictionaries(), HardFinish(k=3), InitializeFromData(), ReviveSilent()],
    ids=lambda c: type(c).__name__,
)
def test_callbacks_that_need_whole_weights(tmp_path: Path, callback: pl.Callback) -> None:
    trainer = make_trainer(tmp_path, 5, callbacks=[callback])
    with pytest.raises(ValueError, match=f"{type(callback).__name__} does not go with shard_features"):
        trainer.fit(SAEModule(SAE_FIELDS, shard_features=True), loader())


def test_compiling(tmp_path: Path) -> None:
    module = SAEModule(SAE_FIELDS, shard_features=True, compile_sae=True)
    with pytest.raises(ValueError, match="compile_sae does not go with shard_features"):
        make_trainer(tmp_path, 5).fit(module, loader())


def test_another_strategy(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"needs the strategy ModelParallelStrategy, got SingleDevice.* set tra"
    ):
        make_trainer(tmp_path, 5).fit(SAEModule(SAE_FIELDS, shard_features=True), loader())


def test_the_strategy_without_sharded_features() -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=ModelParallelStrategy(), logger=False)
    with pytest.raises(ValueError, match=r"set model.shard_features to true"):
        refuse_model_parallel(trainer)
