"""Run by the tests of signals and stopped ranks in a clean process: trains on two ranks, slowly.

Usage: python -m tests.support.ddp_signals FOLDER STEPS PAUSE TIMEOUT [CHECKPOINT]

Each rank writes its process id to FOLDER/pid<rank> when it has taken five steps.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from aen_lightning.callbacks import RankWatch
from aen_lightning.training.module import SAEModule
from tests.support.streams import Batches
from tests.support.training import SAE_FIELDS, make_trainer


class Data(pl.LightningDataModule):
    d_in = 16

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        assert self.trainer is not None
        start = self.trainer.global_step
        return DataLoader(
            Batches(64, 16, start=start, rank=self.trainer.global_rank, world_size=2), batch_size=None
        )


class Slow(pl.Callback):
    def __init__(self, folder: Path, pause: float) -> None:
        self.folder, self.pause = folder, pause

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        time.sleep(self.pause)
        if trainer.global_step == 5:
            temporary = self.folder / f"tmp{trainer.global_rank}"
            temporary.write_text(str(os.getpid()))
            temporary.rename(self.folder / f"pid{trainer.global_rank}")


def main(folder: Path, steps: int, pause: float, timeout: float, checkpoint: str | None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = SAEModule(SAE_FIELDS)
    callbacks: list[pl.Callback] = [Slow(folder, pause), RankWatch(timeout)]
    trainer = make_trainer(folder, steps, devices=2, strategy="ddp", callbacks=callbacks)
    trainer.fit(module, datamodule=Data(), ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:
        torch.save(module.state_dict(), folder / "end.pt")


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        float(sys.argv[3]),
        float(sys.argv[4]),
        *([*sys.argv[5:], None][:1]),
    )
