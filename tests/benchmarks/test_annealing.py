"""A falling k: what SAELens's BatchTopK keeps at each step, counted in its own output."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch

from aen_lightning import SAEModule
from tests.support.streams import batch_at, loader
from tests.support.training import make_trainer


class CountActive(pl.Callback):
    """Counts what the SAE keeps of each training batch, before the step."""

    def __init__(self) -> None:
        self.active: list[int] = []

    @torch.no_grad()
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.active.append(int((module.sae.encode(batch) > 0).sum()))


def test_k_falls_in_a_line_and_stays(load_script, tmp_path: Path):
    annealing = load_script("annealing")
    torch.manual_seed(0)
    module = SAEModule(
        {"architecture": "batchtopk", "d_in": 16, "d_sae": 48, "k": 4, "decoder_init_norm": 1.0}
    )
    count = CountActive()
    make_trainer(tmp_path, 7, callbacks=[annealing.AnnealK(8, 4, 4), count]).fit(module, loader())
    tokens = len(batch_at(0, batch_size=64, d_in=16))
    assert count.active == [k * tokens for k in (8, 7, 6, 5, 4, 4, 4)]
