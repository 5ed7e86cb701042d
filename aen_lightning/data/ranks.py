"""Which share of the data is this process's."""

from __future__ import annotations

import lightning.pytorch as pl


def rank_and_world_size(trainer: pl.Trainer | None) -> tuple[int, int]:
    """This process and the number that share the data out, as Lightning's strategy says; else (0, 1)."""
    shares = None if trainer is None else trainer.distributed_sampler_kwargs
    return (shares["rank"], shares["num_replicas"]) if shares else (0, 1)
