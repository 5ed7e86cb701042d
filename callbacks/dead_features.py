"""Dead features by window, recovery rate and firing density."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from aen_lightning.callbacks._modules import training_sae


class DeadFeatureTracker(pl.Callback):
    """Counts firings over windows of optimizer steps and logs who stayed silent (arXiv:2605.05341, section 6).

    At the end of each window it logs ``sparsity/dead_features_window_pct`` (share of features without a single firing in the
    window, in percent), ``sparsity/recovery_rate`` (share of the previous window's dead that fired in this one, in [0, 1]; 0 if none
    was dead) and, as SAELens does, ``metrics/mean_log10_feature_sparsity``, ``sparsity/below_1e-5`` and ``sparsity/below_1e-6``
    (counts). It only observes: the module has already added up the counts over ranks. Its state is saved with every checkpoint.

    Args:
        window_steps: Length of a window in optimizer steps; 10 000 in the paper.
    """

    def __init__(self, window_steps: int = 10_000) -> None:
        if window_steps < 1:
            raise ValueError(f"DeadFeatureTracker.window_steps must be >= 1, got {window_steps}")
        self.window_steps = window_steps
        self._n_firings: Tensor | None = None
        self._n_tokens = 0
        self._n_steps = 0
        self._previous_dead: Tensor | None = None
        self._last_density: Tensor | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module without an SAE before any work."""
        training_sae(pl_module, self)

    @property
    def density(self) -> Tensor | None:
        """Firing rate per token and feature, shape (d_sae,): this window's so far, or the last full one's just after it closed."""
        if self._n_firings is not None and self._n_tokens > 0:
            return self._n_firings.float() / self._n_tokens
        return self._last_density

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add this step's firings; close the window when it is full."""
        n_firings = outputs["n_firings"]
        if self._n_firings is None:
            self._n_firings = torch.zeros_like(n_firings)
        self._n_firings = self._n_firings.to(n_firings.device).add_(n_firings)
        self._n_tokens += int(outputs["n_tokens"])
        # with gradient accumulation several batches make one optimizer step
        if trainer.global_step == self._n_steps:
            return
        self._n_steps = trainer.global_step
        if self._n_steps % self.window_steps == 0:
            self._close_window(pl_module)

    def _close_window(self, pl_module: pl.LightningModule) -> None:
        assert self._n_firings is not None  # a window has at least one step
        dead = self._n_firings == 0
        density = self._n_firings.float() / self._n_tokens
        log = {
            "sparsity/dead_features_window_pct": 100 * dead.float().mean(),
            "metrics/mean_log10_feature_sparsity": _log10(density).mean(),
            "sparsity/below_1e-5": (density < 1e-5).float().sum(),
            "sparsity/below_1e-6": (density < 1e-6).float().sum(),
        }
        if self._previous_dead is not None:
            previous = self._previous_dead.to(dead.device)
            log["sparsity/recovery_rate"] = (previous & ~dead).sum() / previous.sum().clamp_min(1)
        pl_module.log_dict(log)
        self._previous_dead = dead
        self._last_density = density
        self._n_firings = torch.zeros_like(self._n_firings)
        self._n_tokens = 0

    def log_sparsity(self) -> Tensor | None:
        """``log10`` of the density, shape (d_sae,), float32, as SAELens stores it in ``sparsity.safetensors``; None before any step."""
        return None if self.density is None else _log10(self.density).cpu()

    def state_dict(self) -> dict[str, Any]:
        """The window so far and the last one's result, as tensors and integers."""
        return {
            "n_firings": self._n_firings,
            "n_tokens": self._n_tokens,
            "n_steps": self._n_steps,
            "previous_dead": self._previous_dead,
            "last_density": self._last_density,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._n_firings = state_dict["n_firings"]
        self._n_tokens = state_dict["n_tokens"]
        self._n_steps = state_dict["n_steps"]
        self._previous_dead = state_dict["previous_dead"]
        self._last_density = state_dict["last_density"]


def _log10(density: Tensor) -> Tensor:
    return torch.log10(density + 1e-10)  # SAELens's floor
