from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.training.module import SweepModule
from aen_lightning.training.pareto import sweep_table, write_table
from tests.support.report_pages import CONTEXT, D_SAE, GRID, HOOK, make_run_trainer
from tests.support.tiny_models import D_MODEL, save_tiny_model


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepModule]:
    """A real sweep: five SAEs of three families, and the module that trained them."""
    root = tmp_path_factory.mktemp("sweep")
    module = SweepModule(GRID, seed=0, lr=3e-3, dead_feature_window=5)
    data = SpikedDataModule(d_in=8, n_features=24, k=2, train_batch_size_tokens=32, n_eval_samples=128)
    trainer = make_run_trainer(root)
    trainer.fit(module, datamodule=data)
    folder = root / "version_0"
    write_table(sweep_table(trainer, module, data), folder)
    return folder, module


@pytest.fixture(scope="session")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary on a tiny language model, random, with documents beside it."""
    folder = tmp_path_factory.mktemp("text")
    generator = torch.Generator().manual_seed(0)
    lm = save_tiny_model("llama", folder)
    words = torch.randint(4, 64, (60, 20), generator=generator).tolist()
    documents = folder / "text.jsonl"
    documents.write_text("".join(json.dumps({"text": " ".join(f"w{t}" for t in d)}) + "\n" for d in words))
    metadata = SAEMetadata(
        model_name=lm, model_class_name="AutoModelForCausalLM", hook_name=HOOK, dataset_path=str(documents),
        context_size=CONTEXT, prepend_bos=False, sequence_separator_token="eos", exclude_special_tokens=True,
    )  # fmt: skip
    cfg = StandardSAEConfig(
        d_in=D_MODEL, d_sae=D_SAE, metadata=metadata, normalize_activations="constant_norm_rescale"
    )
    sae = StandardSAE(cfg)
    with torch.no_grad():
        sae.W_enc.normal_(0, 0.3, generator=generator)
        sae.W_dec.normal_(0, 0.3, generator=generator)
        sae.b_enc.fill_(-0.9)
        sae.b_enc[5] = -100.0  # never fires
    path = folder / "dictionary"
    sae.save_model(path)
    return path
