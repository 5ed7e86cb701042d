"""What a LightningModule does where the features of its SAE are sharded over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from sae_lens import TrainingSAE
from torch import Tensor

from aen_lightning.callbacks import EvaluateDictionaries, HardFinish, InitializeFromData, ReviveSilent
from aen_lightning.sharded import FeatureSharded, feature_mesh, in_turns, take_parts_of_whole

_REFUSED = (EvaluateDictionaries, HardFinish, InitializeFromData, ReviveSilent)


class ShardedFeatures:
    """The one SAE of a run, of which each rank makes and keeps its part.

    Args:
        sae: Of :func:`~aen_lightning.sharded.empty_sharded_sae`.
        make_whole: Makes the untrained SAE, the same on every rank.
    """

    def __init__(self, sae: FeatureSharded, make_whole: Callable[[], TrainingSAE[Any]]) -> None:
        self.sae, self._make_whole = sae, make_whole
        self._compared = False

    def check(self, trainer: pl.Trainer, *, compile_sae: bool) -> None:
        """Refuse a run that cannot be sharded, before any work.

        Raises:
            ValueError: With what to change.
        """
        if compile_sae:
            raise ValueError("compile_sae does not go with shard_features: set one of them to false")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
            if isinstance(callback, _REFUSED):
                raise ValueError(
                    f"{type(callback).__name__} does not go with shard_features: remove the callback"
                )
        feature_mesh(trainer)

    def make_weights(self, trainer: pl.Trainer) -> None:
        """Make this rank's part of the weights where it belongs, once; one whole SAE at a time in a node's memory."""
        if self.sae.sharding is None:
            for _ in in_turns(trainer):
                self.sae.shard(self._make_whole(), feature_mesh(trainer), trainer.strategy.root_device)

    def load(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """After Lightning has loaded a checkpoint: load it right if it is one of whole weights."""
        path = trainer.ckpt_path
        if path is not None and Path(path).is_file():
            take_parts_of_whole(path, module, trainer.optimizers)

    def compare_first(self, batch: Tensor) -> None:
        """See that every rank has the same first batch.

        Raises:
            ValueError: If not.
        """
        if not self._compared:
            self.sae.parts.check_same(batch)
            self._compared = True


def refuse_model_parallel(trainer: pl.Trainer) -> None:
    """Where nothing is sharded, refuse the strategy under which ranks would not reduce their gradients.

    Raises:
        ValueError: For ``ModelParallelStrategy``.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError(
            "ModelParallelStrategy shards the SAE's features over the processes: set model.shard_features to true, "
            "or take another strategy (ddp: the whole SAE on each)"
        )
