"""SAEModule trains one SAE under Lightning, SweepModule many on one stream.

Any architecture SAELens can train.
"""

from __future__ import annotations

from typing import Any

from sae_lens import TrainingSAE, TrainingSAEConfig

from aen_lightning.saes.from_dict import build_sae_config
from aen_lightning.sharded import empty_sharded_sae
from aen_lightning.training.base import SAETrainingModule
from aen_lightning.training.grid import Member, expand_grid
from aen_lightning.training.sharded_features import ShardedFeatures
from aen_lightning.training.tracked_sae import new_sae


class SAEModule(SAETrainingModule):
    """Trains an SAE on batches of activations, shape (batch, d_in), with Lightning's Trainer.

    Any architecture SAELens can train runs here, in the same loop and on the same data: ``aen``,
    ``standard``, ``topk``, ``batchtopk``, ``jumprelu``, ``gated``, ``matryoshka_batchtopk``, ... Gradient
    clipping, precision, accumulation, loggers and strategies are the Trainer's. With Adam, a constant rate
    and ``gradient_clip_val=1.0`` it takes the very steps that SAELens's ``SAETrainer`` takes.

    Args:
        sae: ``architecture`` and the fields of its SAELens training config; unknown keys are refused. For
            ``aen`` also the paper's ``lambda_1`` and ``lambda_2``.
        seed: Seed of the initial weights. None: the global generator, which ``seed_everything`` seeds.
        shard_features: Hold a part of the features on each rank, for an SAE too big for one GPU; every rank
            sees the whole batch. Needs ``ModelParallelStrategy`` with ``data_parallel_size`` 1, and
            architecture ``aen``, ``topk`` or ``batchtopk``. The weights are made when a fit begins.
        **training: As for :class:`~aen_lightning.training.base.SAETrainingModule`: ``lr``,
            ``dead_feature_window``, ...

    Raises:
        ValueError: For a config that does not hold together; at ``setup``, if the data do not fit the SAE.
    """

    def __init__(
        self, sae: dict[str, Any], seed: int | None = None, shard_features: bool = False, **training: Any
    ) -> None:
        cfg = build_sae_config(sae)
        if shard_features:
            sae_parts = empty_sharded_sae(cfg)
            super().__init__({"": sae_parts}, **training)
            self.sharded_features = ShardedFeatures(sae_parts, lambda: new_sae(cfg, seed))
        else:
            super().__init__({"": new_sae(cfg, seed)}, **training)
        # plain values only, so that checkpoints load with weights_only; config.yaml has them for people. Not how
        # this run holds the weights: a checkpoint of whole weights opens without ranks.
        self.save_hyperparameters(logger=False, ignore=["shard_features"])

    @classmethod
    def from_config(cls, cfg: TrainingSAEConfig, **kwargs: Any) -> SAEModule:
        """The module for a SAELens training config object; ``kwargs`` are the other constructor arguments."""
        return cls(sae={**cfg.to_dict(), "metadata": {}}, **kwargs)

    @property
    def sae(self) -> TrainingSAE[Any]:
        """The SAE in training."""
        return self.tracked[0].sae


class SweepModule(SAETrainingModule):
    """Trains every member of a grid of SAEs on the same batches; each ends where it would have ended alone.

    The language model runs once for all of them. Each SAE has its own loss, clipping, optimizer state,
    schedule, metrics (keys begin with its name) and export folder; the optimizer's settings are common.

    Args:
        sae: As for :class:`SAEModule`, with a list of values wherever the grid should vary; or a list of such
            dicts, whose grids are joined.
        seed: Seed of the initial weights, or a list of seeds, which multiplies the grid.
        **training: As for :class:`SAEModule`.

    Raises:
        ValueError: For a grid without members, or one whose members do not hold together.
    """

    def __init__(
        self, sae: dict[str, Any] | list[dict[str, Any]], seed: int | list[int] = 0, **training: Any
    ) -> None:
        members: list[Member] = expand_grid(sae, seed)
        super().__init__({m.name: new_sae(build_sae_config(m.sae), m.seed) for m in members}, **training)
        self.members = members
        self.save_hyperparameters(logger=False)
