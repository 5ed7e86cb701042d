"""What every part of the training module knows: the SAEs that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from sae_lens import TrainingSAE
from torch import Tensor

from aen_lightning.saes.aen import AENTrainingSAE
from aen_lightning.training.optimizer import OptimizerSettings
from aen_lightning.training.sharded_features import ShardedFeatures
from aen_lightning.training.tracked_sae import TrackedSAE


class SAEHolder(pl.LightningModule):
    """Holds the SAEs of a run.

    Attributes:
        tracked: The SAEs with their counters and metrics.
        optimizer_settings: The optimizer and its schedule.
        sharded_features: How the features are parted over the ranks; None: they are not.
    """

    tracked: Sequence[TrackedSAE]
    optimizer_settings: OptimizerSettings
    sharded_features: ShardedFeatures | None

    @property
    def saes(self) -> dict[str, TrainingSAE[Any]]:
        """The SAEs by name."""
        return {tracked.name: tracked.sae for tracked in self.tracked}

    @property
    def sparsity_multipliers(self) -> dict[str, Tensor]:
        """Scalars by which the sparsity coefficient of each SAE is multiplied, by name.

        1 unless a callback changes them.
        """
        return {tracked.name: tracked.sparsity_multiplier for tracked in self.tracked}

    @property
    def silent_steps(self) -> dict[str, Tensor]:
        """For how many training steps each feature has not fired on any rank, (d_sae,), int64, by SAE."""
        return {tracked.name: tracked.n_forward_passes_since_fired for tracked in self.tracked}

    @property
    def shard_features(self) -> bool:
        """Whether each rank holds a part of the features and sees the whole batch."""
        return self.sharded_features is not None

    def _adaptive_saes(self) -> list[AENTrainingSAE]:
        return [sae for sae in self.saes.values() if isinstance(sae, AENTrainingSAE)]
