"""Run by tests/sharded in clean processes: trains with the features sharded over the ranks.

Usage: torchrun ... -m tests.support.sharded_training FOLDER, whose plan.json lists the fits to make one after the
other, each with the arguments of ``fit`` and the name of its result.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from aen_lightning.callbacks import DeadFeatureTracker, ExportSAE
from aen_lightning.training.module import SAEModule
from tests.support.streams import batch_at

D_IN, D_SAE = 16, 46  # no multiple of four ranks
N_TOKENS = 30  # nor is this
COMMON: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float64"}
SAES: dict[str, dict[str, Any]] = {
    "aen": {
        **COMMON, "architecture": "aen", "l1_coefficient": 0.2, "l2_coefficient": 0.01, "ema_decay": 0.9,
        "starvation_guard": 0.8, "warmup_delay_steps": 4, "warmup_ramp_steps": 4, "penalty": "mcp",
        "remove_radial_gradient": True,
    },
    "topk": {**COMMON, "architecture": "topk", "k": 4},
    "batchtopk": {**COMMON, "architecture": "batchtopk", "k": 3.5},
}  # fmt: skip


class _Batches(torch.utils.data.IterableDataset[Tensor]):
    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Any:
        return (batch_at(i, batch_size=N_TOKENS, d_in=D_IN).double() for i in range(self.start, self.stop))


class Data(pl.LightningDataModule):
    """The same whole batch on every rank."""

    d_in = D_IN

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start = start

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(_Batches(self.start, 1000), batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(_Batches(2000, 2003), batch_size=None)


def fit(
    folder: Path, name: str, architecture: str, *, sharded: bool, max_steps: int = 20, start: int = 0,
    ckpt_path: str | None = None, save: str | None = None, num_nodes: int = 1, **sae: Any,
) -> None:  # fmt: skip
    """Trains to ``max_steps``; rank 0 writes ``NAME.pt``, the dictionary goes to ``NAME``."""
    torch.manual_seed(0)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    module = SAEModule(
        {**SAES[architecture], **sae}, seed=3, shard_features=sharded, dead_feature_window=2, lr=3e-3
    )
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=world_size)
    tracker = DeadFeatureTracker(window_steps=5)
    trainer = pl.Trainer(
        accelerator="cpu", devices=world_size // num_nodes if sharded else 1, num_nodes=num_nodes,
        strategy=strategy if sharded else "auto", max_steps=max_steps, gradient_clip_val=0.3,
        log_every_n_steps=5, default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[tracker, ExportSAE(dirpath=str(folder / name), with_checkpoints=False)],
    )  # fmt: skip
    trainer.fit(module, datamodule=Data(start), ckpt_path=ckpt_path, weights_only=True)
    log = {k: torch.as_tensor(v) for k, v in trainer.callback_metrics.items()}
    if save is not None:
        trainer.save_checkpoint(folder / save)
    (val_log,) = trainer.validate(module, datamodule=Data(start), verbose=False)
    state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in module.state_dict().items()}
    moments = [
        {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in s.items()}
        for s in trainer.optimizers[0].state.values()
    ]
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in module.parameters())
    if trainer.is_global_zero:
        torch.save(
            {
                "state": state, "moments": moments, "log": log, "val_log": val_log,
                "tracker": tracker.state_dict(), "n_training_samples": module.n_training_samples,
                "held": held,
            },
            folder / f"{name}.pt",
        )  # fmt: skip


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for arguments in json.loads((folder / "plan.json").read_text()):
        fit(folder, **arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
