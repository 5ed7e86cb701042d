"""Folders as runs leave them, without the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from aen_lightning import AENTrainingSAE, AENTrainingSAEConfig
from aen_lightning.saes.export import export_sae
from aen_lightning.saes.input_scaling import InputScaling

D_IN, D_SAE = 8, 16


def trained(seed: int = 0, **changes: Any) -> AENTrainingSAE:
    """A random AEN-SAE that says of itself that it was trained on Pythia-70m."""
    torch.manual_seed(seed)
    sae = AENTrainingSAE(AENTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, **changes))
    metadata = {
        "model_name": "EleutherAI/pythia-70m-deduped", "model_class_name": "AutoModelForCausalLM",
        "hook_name": "blocks.3.hook_resid_post", "hf_hook_name": "gpt_neox.layers.3", "context_size": 128,
        "dataset_path": "EleutherAI/the_pile_deduplicated", "prepend_bos": False, "model_from_pretrained_kwargs": {},
    }  # fmt: skip
    for key, value in metadata.items():
        sae.cfg.metadata[key] = value
    return sae


def make_run(folder: Path, seed: int = 0, kind: str = "per_token", config: str | None = None) -> Path:
    """A run's folder as ``aen fit`` leaves it; ``kind`` is of the input scaling."""
    scaling = InputScaling("average", 0.25) if kind == "average" else InputScaling(kind)  # type: ignore[arg-type]
    for name in ("step_10", "final"):
        export_sae(
            trained(seed),
            folder / "sae" / name,
            input_scaling=scaling,
            log_sparsity=torch.full((D_SAE,), -2.0),
        )
    (folder / "metrics.csv").write_text(
        "metrics/l0,metrics/explained_variance,details/n_training_samples,step,val/metrics/l0,val/metrics/explained_variance\n"
        "40,0.5,4096,9,,\n,,,9,39,0.51\n33,0.8,8192,19,,\n,,,20,32.5,0.8125\n"
    )
    default = "seed_everything: 7\ntrainer: {max_steps: 20, logger: null}\nmodel: {lr: 0.001, sae: {architecture: aen, gamma: 0.5}}\n"
    (folder / "config.yaml").write_text(config or default)
    return folder
