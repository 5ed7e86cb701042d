"""Harvests of a tiny model, and what they must give, by hand and by transformers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from aen_lightning.harvest import HarvestDataModule, HarvestModule, ShardWriter, run_harvest
from aen_lightning.shards import Manifest, ShardSet
from tests.support.tiny_models import EOS, tiny_tokenizer

HOOK = "blocks.1.hook_resid_post"  # hidden_states[2] of the full model
CONTEXT = 16


def packed(documents: list[list[int]]) -> torch.Tensor:
    """Documents joined by </s>, cut into rows, by hand; the rest is left out."""
    rows, row = [], []
    for d in documents:
        for j, token in enumerate(d):
            if j == 0 and row:  # SAELens puts no separator at the beginning of a row
                row.append(EOS)
                if len(row) == CONTEXT:
                    rows.append(row)
                    row = []
            row.append(token)
            if len(row) == CONTEXT:
                rows.append(row)
                row = []
    return torch.tensor(rows)


def hidden(model_path: str, rows: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Layer 1's output by transformers, with the whole model."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(rows, output_hidden_states=True, **kwargs).hidden_states[2]


def harvest(
    path: Path, model: str | HarvestModule, text: str, *, shard_size_mib: float = 0.01, model_kwargs: dict[str, Any] | None = None,
    on_non_finite: Any = "stop", **data_kwargs: Any,
) -> Manifest:  # fmt: skip
    module = (
        model if isinstance(model, HarvestModule) else HarvestModule(model, [HOOK], **(model_kwargs or {}))
    )
    data = HarvestDataModule(text, **({"context_size": CONTEXT, "batch_size_prompts": 4} | data_kwargs))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=path.parent,
        callbacks=[ShardWriter(str(path), shard_size_mib=shard_size_mib, on_non_finite=on_non_finite)],
    )  # fmt: skip
    return run_harvest(trainer, module, data)


def rows_of(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    source = ShardSet(path)
    ids = source.token_ids()
    assert ids is not None
    return source.gather(np.arange(source.n_tokens), [HOOK])[HOOK], ids


def as_set(path: Path) -> Counter[tuple[int, bytes]]:
    """Each (token, activation) row, by its bytes, with how often it is there."""
    activations, ids = rows_of(path)
    return Counter((int(i), x.numpy().tobytes()) for i, x in zip(ids, activations, strict=True))


def saved(model: Any, tmp_path: Path) -> str:
    """A folder with the model and the tokenizer."""
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")
