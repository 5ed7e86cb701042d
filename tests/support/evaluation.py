"""Dictionaries and inputs to evaluate: small, random, and the same each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import SAE
from torch import Tensor

from aen_lightning.data.text import TextActivationsDataModule
from aen_lightning.evaluate import (
    TextInputs,
)
from tests.support.shard_sets import HOOK as SHARD_HOOK
from tests.support.shard_sets import write_set
from tests.support.tiny_models import D_MODEL, tiny_tokenizer

HOOK = "blocks.1.hook_resid_post"
HF_HOOK = "model.layers.1"
CONTEXT = 16
D_SAE = 40


def text_inputs(model: Any, rows: list[list[int]], **options: Any) -> TextInputs:
    data = TextActivationsDataModule(
        hook_name=options.pop("hook_name", HOOK), model=model, tokenizer=tiny_tokenizer(), context_size=CONTEXT,
        dataset=Dataset.from_dict({"tokens": rows}), held_out_documents=len(rows), train_batch_size_tokens=16, **options,
    )  # fmt: skip
    return TextInputs(data, lm=model, batch_size_prompts=5)


def dictionary(architecture: str, *, normalize_activations: str = "none", seed: int = 0) -> SAE[Any]:
    fields: dict[str, Any] = {"k": 6} if architecture == "topk" else {}
    sae = SAE.from_dict(
        {
            "architecture": architecture, "d_in": D_MODEL, "d_sae": D_SAE, "normalize_activations": normalize_activations,
            "metadata": {"hook_name": HF_HOOK, "model_name": "tiny", "prepend_bos": False}, **fields,
        }
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.2 if name == "W_dec" else 0.1)
    sae.W_enc.data = 2 * sae.W_dec.data.T.contiguous()
    if architecture == "jumprelu":
        sae.threshold.data = torch.full((D_SAE,), 0.3)
    return sae.requires_grad_(False)


def identity_dictionary(normalize_activations: str) -> SAE[Any]:
    """Reconstructs anything: a feature for each coordinate and sign."""
    sae = SAE.from_dict(
        {
            "architecture": "standard",
            "d_in": D_MODEL,
            "d_sae": 2 * D_MODEL,
            "normalize_activations": normalize_activations,
        }
    )
    eye = torch.eye(D_MODEL)
    W_dec = torch.cat([eye, -eye])
    sae.load_state_dict(
        {"W_dec": W_dec, "W_enc": W_dec.T.contiguous(), "b_enc": torch.zeros(len(W_dec)), "b_dec": 0 * eye[0]}
    )
    return sae.requires_grad_(False)


def shard_set(folder: Path) -> tuple[Path, Tensor, Tensor]:
    path = folder / "shards"
    expected, ids = write_set(path, [20, 17])
    return path, expected[SHARD_HOOK], ids
