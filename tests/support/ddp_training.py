"""Run by test_ddp.py in a clean process: trains on N ranks and writes what rank 0 ends with.

Usage: python -m tests.support.ddp_training N_RANKS OUTPUT.pt [ARCHITECTURE [FINISH]]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from aen_lightning.callbacks import DeadFeatureTracker, ExportSAE, HardFinish, ReviveSilent
from aen_lightning.callbacks.modules import encoder_biases
from aen_lightning.training.module import SAEModule
from tests.support.streams import Batches, batch_at

GLOBAL_BATCH = 64


class Data(pl.LightningDataModule):
    """Each rank gets its equal share of every batch, so that N ranks together see what one process sees."""

    d_in = 16

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        assert self.trainer is not None
        return DataLoader(
            Batches(GLOBAL_BATCH, 16, rank=self.trainer.global_rank, world_size=self.trainer.world_size),
            batch_size=None,
        )

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        assert self.trainer is not None
        batches = [batch_at(1000 + i, batch_size=GLOBAL_BATCH, d_in=16) for i in range(4)]
        return DataLoader(batches[self.trainer.global_rank :: self.trainer.world_size], batch_size=None)  # type: ignore[arg-type]


def main(n_ranks: int, output: Path, architecture: str = "aen", finish: Any = None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = SAEModule(
        {
            "architecture": architecture,
            "d_in": 16,
            "d_sae": 48,
            "l1_coefficient": 0.2,
            "l2_coefficient": 0.01,
            "ema_decay": 0.95,
            "starvation_guard": 0.8,
            "warmup_delay_steps": 10,
            "warmup_ramp_steps": 10,
        }
    )
    tracker = DeadFeatureTracker(window_steps=25)
    with torch.no_grad():  # silent on every rank, so that they are raised on every rank
        for bias in encoder_biases(module.sae):
            bias[:6] = -1.5
    hard = [] if finish is None else [HardFinish(4, at=20, finish=finish)]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=n_ranks,
        strategy="ddp" if n_ranks > 1 else "auto",
        max_steps=40,
        log_every_n_steps=10,
        default_root_dir=output.parent,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[
            *hard,
            tracker,
            ReviveSilent(window=3),
            ExportSAE(dirpath=str(output.parent / f"sae_{n_ranks}")),
        ],
    )
    trainer.fit(module, datamodule=Data())
    train_log = {k: torch.as_tensor(v) for k, v in trainer.callback_metrics.items()}
    (val_log,) = trainer.validate(module, datamodule=Data(), verbose=False)
    # every rank must hold the same state, not only the one that is saved
    gathered = trainer.strategy.all_gather(module.sae.feature_acts_ema)
    offsets = None
    if finish == "jumprelu":
        offsets = trainer.strategy.all_gather(module.sae.threshold_offsets.detach()).reshape(-1, 48)
    if trainer.is_global_zero:
        torch.save(
            {
                "state": module.state_dict(),
                "train_log": train_log,
                "val_log": {k: torch.tensor(v) for k, v in val_log.items()},
                "ema_of_each_rank": gathered.reshape(-1, 48),
                "offsets_of_each_rank": offsets,
                "tracker": tracker.state_dict(),
                "n_training_samples": module.n_training_samples,
            },
            output,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
