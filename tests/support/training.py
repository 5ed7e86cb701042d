"""What tests of training have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from sae_lens.saes.sae import TrainStepInput

SAE_FIELDS: dict[str, Any] = {
    "architecture": "aen",
    "d_in": 16,
    "d_sae": 48,
    "l1_coefficient": 0.05,
    "l2_coefficient": 0.01,
    "ema_decay": 0.98,
    "warmup_delay_steps": 40,
    "warmup_ramp_steps": 60,
    "l1_warmup_steps": 30,
}


def make_trainer(path: Path, max_steps: int, **kwargs: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": max_steps,
        "default_root_dir": path,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_val": 1.0,
    }
    return pl.Trainer(**{**defaults, **kwargs})


def step_input(x: torch.Tensor, n: int = 0, l1: float = 0.5, l2: float = 0.1) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x,
        coefficients={"l1": l1, "l2": l2},
        dead_neuron_mask=None,
        n_training_steps=n,
        is_logging_step=False,
    )
