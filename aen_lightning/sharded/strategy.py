"""What sharded features need of Lightning's strategy."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh

_MEND = (
    "set trainer.strategy to lightning.pytorch.strategies.ModelParallelStrategy with data_parallel_size 1 and "
    "tensor_parallel_size {n} (the number of processes)"
)


def feature_mesh(trainer: pl.Trainer) -> DeviceMesh:
    """The ranks over which the features are sharded: all of the run.

    Raises:
        ValueError: For another strategy, or one that would also split the batch.
    """
    strategy = trainer.strategy
    mend = _MEND.format(n=trainer.world_size)
    if not isinstance(strategy, ModelParallelStrategy):
        raise ValueError(
            f"shard_features needs the strategy ModelParallelStrategy, got {type(strategy).__name__}: {mend}"
        )
    mesh = strategy.device_mesh
    if mesh["data_parallel"].size() != 1:
        raise ValueError(
            f"shard_features has every rank see the whole batch, but data_parallel_size is "
            f"{mesh['data_parallel'].size()}: {mend}"
        )
    return mesh["tensor_parallel"]


def in_turns(trainer: pl.Trainer) -> Iterator[None]:
    """Yields once, when it is this process's turn among those of its node."""
    for turn in range(max(1, trainer.num_devices)):
        if turn == trainer.local_rank:
            yield
        dist.barrier()
