"""SAEModule trains one SAE under Lightning, SweepModule many on one stream: any architecture SAELens can train."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
from sae_lens import TrainingSAE, TrainingSAEConfig

from aen_lightning.saes.from_dict import build_sae_config
from aen_lightning.training.base import SAETrainingModule
from aen_lightning.training.grid import Member, expand_grid
from aen_lightning.training.tracked_sae import new_sae

SchedulerName = Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"]


class SAEModule(SAETrainingModule):
    """Trains an SAE on batches of activations, shape (batch, d_in), with Lightning's Trainer.

    Any architecture SAELens can train runs here, in the same loop and on the same data: ``aen``, ``standard``, ``topk``,
    ``batchtopk``, ``jumprelu``, ``gated``, ``matryoshka_batchtopk``, ... Gradient clipping, precision, accumulation, loggers and
    strategies are the Trainer's. With Adam, a constant rate and ``gradient_clip_val=1.0`` it takes the very steps that
    SAELens's ``SAETrainer`` takes.

    Args:
        sae: ``architecture`` and the fields of its SAELens training config; unknown keys are refused. For ``aen`` also the
            paper's ``lambda_1`` and ``lambda_2``.
        lr: Learning rate.
        optimizer: Class path of a ``torch.optim.Optimizer`` that takes ``params, lr=...``.
        optimizer_kwargs: Further arguments of the optimizer. Adam and AdamW run fused (not in mixed precision) unless
            ``fused`` is given.
        lr_scheduler_name: SAELens's ``constant``, ``cosineannealing`` or ``cosineannealingwarmrestarts``.
        lr_warm_up_steps: Optimizer steps of linear warm-up.
        lr_decay_steps: Optimizer steps of linear decay to zero at the end; needs ``max_steps`` on the Trainer.
        lr_end: Rate at the end of a cosine schedule. None: a tenth of ``lr``, as in SAELens.
        n_restart_cycles: Cycles of ``cosineannealingwarmrestarts``.
        dead_feature_window: Training steps without firing after which a feature counts as dead in ``sparsity/dead_features``
            and, in architectures that revive features, gets the auxiliary loss.
        compile_sae: Compile the training forward pass with ``torch.compile``; the step is then dense.
        sae_compilation_mode: ``torch.compile``'s mode.
        sae_compilation_backend: ``torch.compile``'s backend; ``inductor`` needs a C++ compiler on a CPU.
        seed: Seed of the initial weights. None: the global generator, which ``seed_everything`` seeds.

    Raises:
        ValueError: For a config that does not hold together; at ``setup``, if the data do not fit the SAE.
    """

    def __init__(
        self,
        sae: dict[str, Any],
        lr: float = 1e-3,
        optimizer: str = "torch.optim.Adam",
        optimizer_kwargs: dict[str, Any] | None = None,
        lr_scheduler_name: SchedulerName = "constant",
        lr_warm_up_steps: int = 0,
        lr_decay_steps: int = 0,
        lr_end: float | None = None,
        n_restart_cycles: int = 1,
        dead_feature_window: int = 1000,
        compile_sae: bool = False,
        sae_compilation_mode: str | None = None,
        sae_compilation_backend: str = "inductor",
        seed: int | None = None,
    ) -> None:
        pl.LightningModule.__init__(self)
        self.save_hyperparameters()  # plain values only, so that checkpoints load with weights_only
        super().__init__({"": new_sae(build_sae_config(sae), seed)})

    @classmethod
    def from_config(cls, cfg: TrainingSAEConfig, **kwargs: Any) -> SAEModule:
        """The module for a SAELens training config object; ``kwargs`` are the other constructor arguments."""
        return cls(sae={**cfg.to_dict(), "metadata": {}}, **kwargs)

    @property
    def sae(self) -> TrainingSAE[Any]:
        """The SAE in training."""
        return self.units[0].sae


class SweepModule(SAETrainingModule):
    """Trains every member of a grid of SAEs on the same batches; each ends where it would have ended alone.

    The language model runs once for all of them. Each SAE has its own loss, clipping, optimizer state, schedule, metrics (keys
    begin with its name) and export folder; the optimizer's settings are common.

    Args:
        sae: As for :class:`SAEModule`, with a list of values wherever the grid should vary; or a list of such dicts, whose
            grids are joined.
        seed: Seed of the initial weights, or a list of seeds, which multiplies the grid.
        lr: As for :class:`SAEModule`, like all that follow.

    Raises:
        ValueError: For a grid without members, or one whose members do not hold together.
    """

    def __init__(
        self,
        sae: dict[str, Any] | list[dict[str, Any]],
        seed: int | list[int] = 0,
        lr: float = 1e-3,
        optimizer: str = "torch.optim.Adam",
        optimizer_kwargs: dict[str, Any] | None = None,
        lr_scheduler_name: SchedulerName = "constant",
        lr_warm_up_steps: int = 0,
        lr_decay_steps: int = 0,
        lr_end: float | None = None,
        n_restart_cycles: int = 1,
        dead_feature_window: int = 1000,
        compile_sae: bool = False,
        sae_compilation_mode: str | None = None,
        sae_compilation_backend: str = "inductor",
    ) -> None:
        pl.LightningModule.__init__(self)
        self.save_hyperparameters()
        self.members: list[Member] = expand_grid(sae, seed)
        super().__init__({m.name: new_sae(build_sae_config(m.sae), m.seed) for m in self.members})
