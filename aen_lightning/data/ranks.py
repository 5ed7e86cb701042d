"""Which share of the data is this process's."""

from __future__ import annotations

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy


def rank_and_world_size(trainer: pl.Trainer | None) -> tuple[int, int]:
    """This process and the number that share the data out, as Lightning's strategy says; else (0, 1)."""
    shares = None if trainer is None else trainer.distributed_sampler_kwargs
    return (shares["rank"], shares["num_replicas"]) if shares else (0, 1)


def ranks_of_same_batch(trainer: pl.Trainer | None) -> dist.ProcessGroup | None:
    """The processes that need the very batches of this one, as the parts of one sharded model do; None: no other."""
    strategy = None if trainer is None else trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    mesh = strategy.device_mesh["tensor_parallel"]
    return mesh.get_group() if mesh.size() > 1 else None
