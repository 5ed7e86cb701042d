"""Run by test_ddp.py in a clean process: trains on live text on two ranks; each writes the rows of tokens its
model was run on.

Usage: python -m tests.support.ddp_text MODEL_FOLDER TEXT_FILE OUTPUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from aen_lightning.data.text import TextActivationsDataModule
from aen_lightning.language_model.cut_model import CutModel, load_cut_model
from aen_lightning.training.module import SAEModule

HOOK = "blocks.1.hook_resid_post"


class Recorder:
    """A language model that remembers what it read."""

    def __init__(self, model: CutModel) -> None:
        self.model, self.hooks, self.device = model, model.hooks, model.device
        self.rows: list[Tensor] = []

    def activations(self, input_ids: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        self.rows.append(input_ids)
        return self.model.activations(input_ids, **kwargs)


def main(folder: str, text_file: str, output: Path) -> None:
    torch.set_num_threads(1)
    recorder = Recorder(load_cut_model(folder, [HOOK]))
    data = TextActivationsDataModule(
        model_name=folder, hook_name=HOOK, dataset_path=text_file, context_size=16, store_batch_size_prompts=2, train_batch_size_tokens=32, buffer_size_tokens=64,
        held_out_documents=0, model=recorder,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=12, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=output,
    )  # fmt: skip
    sae = {"architecture": "aen", "d_in": recorder.hooks[0].d_in, "d_sae": 32, "l1_coefficient": 0.1}
    trainer.fit(SAEModule(sae), datamodule=data)
    torch.save(torch.cat(recorder.rows), output / f"rank_{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
