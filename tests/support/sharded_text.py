"""Run by tests/sharded in clean processes: live text, the model's rows split over the ranks, features sharded.

Usage: torchrun ... -m tests.support.sharded_text MODEL_FOLDER TEXT_FILE OUTPUT_FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from aen_lightning.data.text import TextActivationsDataModule
from aen_lightning.language_model.cut_model import load_cut_model
from aen_lightning.training.module import SAEModule
from tests.support.ddp_text import HOOK, Recorder


def train(folder: str, text_file: str, output: Path, *, n_ranks: int) -> None:
    """Trains 8 steps; each rank writes ``rank_R_of_N.pt``: the token rows it ran, and the whole weights."""
    recorder = Recorder(load_cut_model(folder, [HOOK]))
    data = TextActivationsDataModule(
        model_name=folder, hook_name=HOOK, dataset_path=text_file, context_size=16, store_batch_size_prompts=3,
        train_batch_size_tokens=32, buffer_size_tokens=64, held_out_documents=8, model=recorder,
    )  # fmt: skip
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=n_ranks)
    trainer = pl.Trainer(
        accelerator="cpu", devices=n_ranks, strategy=strategy if n_ranks > 1 else "auto", max_steps=8, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=output,
        limit_val_batches=2, val_check_interval=4, num_sanity_val_steps=0,
    )  # fmt: skip
    d_in = recorder.hooks[0].d_in
    sae = {"architecture": "aen", "d_in": d_in, "d_sae": 32, "l1_coefficient": 0.1, "dtype": "float64"}
    module = SAEModule(sae, seed=0, shard_features=n_ranks > 1)
    trainer.fit(module, datamodule=data)
    state: dict[str, Tensor] = {
        k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in module.state_dict().items()
    }
    torch.save(
        {"rows": torch.cat(recorder.rows), "calls": [len(r) for r in recorder.rows], "state": state},
        output / f"rank_{trainer.global_rank}_of_{n_ranks}.pt",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], sys.argv[2], Path(sys.argv[3]), n_ranks=int(os.environ["WORLD_SIZE"]))
