"""Dead features by window, recovery rate and firing density."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from aen_lightning.callbacks.modules import prefixed, training_saes
from aen_lightning.saes.lengths import Length, check_length, in_steps, is_share


class DeadFeatureTracker(pl.Callback):
    """Counts firings over windows of optimizer steps and logs who stayed silent (arXiv:2605.05341, section
    6).

    At the end of each window it logs ``sparsity/dead_features_window_pct`` (share of features without a
    single firing in the window, in percent), ``sparsity/recovery_rate`` (share of the previous window's dead
    that fired in this one, in [0, 1]; 0 if none was dead) and, as SAELens does,
    ``metrics/mean_log10_feature_sparsity``, ``sparsity/below_1e-5`` and ``sparsity/below_1e-6`` (counts);
    with several SAEs the keys begin with their names. It only observes: the module has already added up the
    counts over ranks. Its state is saved with every checkpoint.

    Args:
        window_steps: Length of a window in optimizer steps, or a share of the run; 10 000 in the paper.
    """

    def __init__(self, window_steps: Length = 10_000) -> None:
        check_length(window_steps, "DeadFeatureTracker.window_steps", at_least=1)
        self.window_steps = window_steps
        self._n_steps = 0
        self._windows: dict[str, _Window] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module without SAEs before any work."""
        training_saes(pl_module, self)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add this step's firings; close the window when it is full."""
        for name, n_firings in outputs["n_firings"].items():
            self._windows.setdefault(name, _Window()).add(n_firings, outputs["n_tokens"])
        # with gradient accumulation several batches make one optimizer step
        if trainer.global_step == self._n_steps:
            return
        self._n_steps = trainer.global_step
        run_steps = trainer.estimated_stepping_batches if is_share(self.window_steps) else None
        window_steps = in_steps(self.window_steps, run_steps, "window_steps")
        if self._n_steps % window_steps == 0:
            for name, window in self._windows.items():
                pl_module.log_dict({prefixed(name, key): value for key, value in window.close().items()})

    def density(self, name: str = "") -> Tensor | None:
        """Firing rate per token of each feature, shape (d_sae,): of the present window so far, or of the last
        full one just after
        it closed; None before any step. ``name`` is the SAE's, where a run trains several."""
        return self._windows[name].density if name in self._windows else None

    def log_sparsity(self, name: str = "") -> Tensor | None:
        """``log10`` of the density, float32, as SAELens stores it in ``sparsity.safetensors``."""
        density = self.density(name)
        return None if density is None else _log10(density).cpu()

    def state_dict(self) -> dict[str, Any]:
        """The windows so far and the last ones' results, as tensors and integers."""
        return {
            "n_steps": self._n_steps,
            "windows": {name: dict(vars(window)) for name, window in self._windows.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._n_steps = state_dict["n_steps"]
        self._windows = {name: _Window(**window) for name, window in state_dict["windows"].items()}


class _Window:
    """The counts of one SAE."""

    def __init__(
        self,
        n_firings: Tensor | None = None,
        n_tokens: int = 0,
        previous_dead: Tensor | None = None,
        last_density: Tensor | None = None,
    ) -> None:
        self.n_firings = n_firings
        self.n_tokens = n_tokens
        self.previous_dead = previous_dead
        self.last_density = last_density

    @property
    def density(self) -> Tensor | None:
        if self.n_firings is not None and self.n_tokens > 0:
            return self.n_firings.float() / self.n_tokens
        return self.last_density

    def add(self, n_firings: Tensor, n_tokens: int) -> None:
        before = (
            torch.zeros_like(n_firings) if self.n_firings is None else self.n_firings.to(n_firings.device)
        )
        self.n_firings = before + n_firings
        self.n_tokens += n_tokens

    def close(self) -> dict[str, Tensor]:
        """What to log of the full window; the next one starts empty."""
        assert self.n_firings is not None  # a window has at least one step
        dead = self.n_firings == 0
        density = self.n_firings.float() / self.n_tokens
        log = {
            "sparsity/dead_features_window_pct": 100 * dead.float().mean(),
            "metrics/mean_log10_feature_sparsity": _log10(density).mean(),
            "sparsity/below_1e-5": (density < 1e-5).float().sum(),
            "sparsity/below_1e-6": (density < 1e-6).float().sum(),
        }
        if self.previous_dead is not None:
            previous = self.previous_dead.to(dead.device)
            log["sparsity/recovery_rate"] = (previous & ~dead).sum() / previous.sum().clamp_min(1)
        self.previous_dead, self.last_density = dead, density
        self.n_firings, self.n_tokens = torch.zeros_like(self.n_firings), 0
        return log


def _log10(density: Tensor) -> Tensor:
    return torch.log10(density + 1e-10)  # SAELens's floor
