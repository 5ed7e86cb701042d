"""The training loop that one SAE and many on one stream have in common."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sae_lens import TrainingSAE
from sae_lens.training.optim import get_lr_scheduler
from torch import Tensor, nn

from aen_lightning import sparse
from aen_lightning.callbacks import DeadFeatureTracker, DelayedWarmup, EMAWeightRefresh, ExportSAE, Throughput
from aen_lightning.callbacks._modules import prefixed
from aen_lightning.saes.aen import AENTrainingSAE
from aen_lightning.saes.export import check_scaling, export_sae
from aen_lightning.saes.input_scaling import InputScaling
from aen_lightning.training.tracked_sae import SAEUnit


class SAETrainingModule(pl.LightningModule):
    """Trains SAEs on batches of activations, each with its own loss and its gradients clipped on their own.

    A base of the modules in :mod:`aen_lightning.training.module` and :mod:`aen_lightning.training.refit`, which say what ``self.hparams`` must hold.

    Args:
        saes: The SAEs by name.
    """

    def __init__(self, saes: Mapping[str, TrainingSAE[Any]]) -> None:
        super().__init__()
        h = self.hparams
        if not h["lr"] > 0:
            raise ValueError(f"lr must be positive, got {h['lr']}")
        self.optimizer_class = _optimizer_class(h["optimizer"], h["optimizer_kwargs"] or {})
        self.units = cast(
            "Sequence[SAEUnit]",
            nn.ModuleList(
                SAEUnit(sae, name=name, dead_feature_window=h["dead_feature_window"]) for name, sae in saes.items()
            ),
        )
        self.n_training_samples = 0
        self.input_scaling = InputScaling()

    @property
    def saes(self) -> dict[str, TrainingSAE[Any]]:
        """The SAEs by name; the only one of a run has the empty name."""
        return {unit.name: unit.sae for unit in self.units}

    # --- wiring ---------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[pl.Callback]:
        """The callbacks training needs; one of the same class (or a subclass) given to the Trainer takes its place."""
        defaults: list[type[pl.Callback]] = [DeadFeatureTracker, ExportSAE, Throughput]
        if self._adaptive_saes():
            defaults = [DelayedWarmup, EMAWeightRefresh, *defaults]
        given = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        return [default() for default in defaults if not any(isinstance(c, default) for c in given)]

    def setup(self, stage: str) -> None:
        """Check the data against each SAE before any work, and take over what they say of themselves."""
        datamodule = getattr(self.trainer, "datamodule", None)
        d_in = getattr(datamodule, "d_in", None)
        if isinstance(d_in, dict):
            raise ValueError(
                f"{type(self).__name__} trains on one hook, but {type(datamodule).__name__} gives {', '.join(d_in)}: "
                "set hook_name to one of them"
            )
        for unit in self.units:
            if d_in is not None and d_in != unit.sae.cfg.d_in:
                raise ValueError(
                    f"the SAE has d_in={unit.sae.cfg.d_in}, but {type(datamodule).__name__} gives activations of width {d_in}: "
                    f"set model.sae.d_in to {d_in}"
                )
        self._adopt_data_description()
        for sae in self._adaptive_saes():
            sae.reduce_mean = self._reduce_mean
        if self.hparams["compile_sae"] and stage == "fit":
            for unit in self.units:
                unit.sae.training_forward_pass = torch.compile(
                    unit.sae.training_forward_pass,
                    mode=self.hparams["sae_compilation_mode"],
                    backend=self.hparams["sae_compilation_backend"],
                )

    def _adaptive_saes(self) -> list[AENTrainingSAE]:
        return [unit.sae for unit in self.units if isinstance(unit.sae, AENTrainingSAE)]

    def _adopt_data_description(self) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        scaling = getattr(datamodule, "input_scaling", None)
        if isinstance(scaling, InputScaling):
            self.input_scaling = scaling
        for unit in self.units:
            for key, value in getattr(datamodule, "sae_metadata", {}).items():
                unit.sae.cfg.metadata[key] = value
            check_scaling(unit.sae.cfg, self.input_scaling)

    def _reduce_mean(self, tensor: Tensor) -> Tensor:
        return cast(Tensor, self.trainer.strategy.reduce(tensor, reduce_op="mean"))

    def on_fit_start(self) -> None:
        """Tell the SAEs where Lightning put them, and that callbacks now schedule their adaptive state."""
        for unit in self.units:
            # Module.to reaches parameters only; SAELens keeps device and dtype as plain attributes as well.
            unit.sae.to(device=self.device)
            if unit.sae.W_enc.dtype != unit.sae.dtype:
                unit.sae.to(dtype=unit.sae.W_enc.dtype)
        for sae in self._adaptive_saes():
            sae.scheduled_externally = True
            sae.micro_batches_per_step = self.trainer.accumulate_grad_batches

    def on_train_start(self) -> None:
        """Read the data's description again: an average scale is only known once data have been seen."""
        self._adopt_data_description()

    def on_fit_end(self) -> None:
        """Hand the schedule back, so that the SAEs train as well under SAELens's own trainer."""
        for sae in self._adaptive_saes():
            sae.scheduled_externally = False
            sae.micro_batches_per_step = 1
            sae.W_enc.data = sae.W_enc.data.contiguous()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer with a parameter group per SAE, and SAELens's learning-rate schedule, stepped once per optimizer step."""
        h = self.hparams
        arguments: dict[str, Any] = {"lr": h["lr"], **(h["optimizer_kwargs"] or {})}
        # Adam's fused kernel takes the same steps several times faster; Lightning does not clip with it in mixed precision
        if self.optimizer_class in (torch.optim.Adam, torch.optim.AdamW) and "mixed" not in str(self.trainer.precision):
            arguments.setdefault("fused", self.device.type in ("cpu", "cuda"))
        optimizer_class = self.optimizer_class
        if self._lays_encoders_feature_by_feature():
            # the layout of the step on the non-zeros, and the Adam that keeps to it; the same numbers as torch's
            for sae in self._adaptive_saes():
                sparse.feature_major_(sae.W_enc)
            optimizer_class = sparse.FusedAdam
        groups = [{"params": list(unit.sae.parameters())} for unit in self.units]
        optimizer = optimizer_class(groups, **arguments)
        training_steps = self.trainer.estimated_stepping_batches
        if (h["lr_decay_steps"] or h["lr_scheduler_name"] != "constant") and training_steps == float("inf"):
            raise ValueError("lr_decay_steps and cosine schedules need to know the end: set trainer.max_steps")
        scheduler = get_lr_scheduler(
            h["lr_scheduler_name"],
            optimizer=optimizer,
            training_steps=int(training_steps) if training_steps != float("inf") else 0,
            lr=h["lr"],
            warm_up_steps=h["lr_warm_up_steps"],
            decay_steps=h["lr_decay_steps"],
            lr_end=h["lr"] / 10 if h["lr_end"] is None else h["lr_end"],
            num_cycles=h["n_restart_cycles"],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lays_encoders_feature_by_feature(self) -> bool:
        return (
            self.optimizer_class is torch.optim.Adam
            and not self.hparams["optimizer_kwargs"]
            and "mixed" not in str(self.trainer.precision)
            and self.trainer.world_size == 1  # DDP and FSDP lay out their buckets before the optimizer is made
            and not self.hparams["compile_sae"]
            and any(sae.sparse_step_applies() for sae in self._adaptive_saes())
            and sparse.FusedAdam.supported()
        )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer asks, each SAE's gradients by their own norm: as in separate runs."""
        if len(self.units) == 1 or not gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for unit in self.units:
            if gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(unit.sae.parameters(), gradient_clip_val)
            else:
                nn.utils.clip_grad_norm_(unit.sae.parameters(), gradient_clip_val)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer's step, then the decoder rows back to unit norm."""
        super().optimizer_step(*args, **kwargs)
        for sae in self._adaptive_saes():
            sae.normalize_decoder()

    # --- steps ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        """A SAELens training forward pass of every SAE on the same batch (batch, d_in).

        Returns:
            ``loss`` (scalar, the sum), ``n_firings``: by SAE name, how often each feature fired, shape (d_sae,), int64, and
            ``n_tokens``, an int; counts are over all ranks.
        """
        n_steps, is_logging_step = self.trainer.global_step, self._is_logging_step()
        # equal batches on every rank, as everywhere in a data-parallel step
        n_tokens = len(batch) * self.trainer.world_size
        self.n_training_samples += n_tokens
        losses, n_firings, logs = [], {}, {}
        for unit in self.units:
            self._check_batch(batch, unit)
            output = unit.training_forward_pass(batch, n_training_steps=n_steps, is_logging_step=is_logging_step)
            losses.append(output.loss)
            with torch.no_grad():
                counts = self.trainer.strategy.reduce(unit.firing_counts(output), reduce_op="sum")
                n_firings[unit.name] = cast(Tensor, counts)
                unit.note_firings(n_firings[unit.name])
                if is_logging_step:
                    logs[unit.name] = unit.log_values(output, n_steps)
        if is_logging_step:
            self._log_training(logs)
        return {"loss": torch.stack(losses).sum(), "n_firings": n_firings, "n_tokens": n_tokens}

    def _check_batch(self, batch: Tensor, unit: SAEUnit) -> None:
        d_in = unit.sae.cfg.d_in
        if not isinstance(batch, Tensor) or batch.ndim != 2 or batch.shape[-1] != d_in:
            got = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(
                f"{type(self).__name__} trains on batches of shape (batch, d_in={d_in}), got {got}; "
                "flatten (batch, context, d_in) first"
            )

    def _is_logging_step(self) -> bool:
        step = self.trainer.global_step
        return step == 0 or (step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # set by a connector

    def _log_training(self, logs: dict[str, dict[str, Any]]) -> None:
        log = {prefixed(name, key): value for name, values in logs.items() for key, value in values.items()}
        log["details/n_training_samples"] = float(self.n_training_samples)
        log["details/current_learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict(log, sync_dist=True)

        def mean(key: str) -> Tensor:
            return torch.stack([values[key].float() for values in logs.values()]).mean()

        dead = [logs[unit.name]["sparsity/dead_features"] / unit.sae.cfg.d_sae for unit in self.units]
        bar = {
            "loss": mean("losses/overall_loss"),
            "l0": mean("metrics/l0"),
            "ev": mean("metrics/explained_variance"),
            "dead%": 100 * torch.stack(dead).mean(),
        }
        self.log_dict(bar, prog_bar=True, logger=False)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Update the held-out metrics; no SAE's state changes."""
        for unit in self.units:
            self._check_batch(batch, unit)
            unit.evaluate(batch, unit.val_metrics)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """As :meth:`validation_step`, for the test split."""
        for unit in self.units:
            self._check_batch(batch, unit)
            unit.evaluate(batch, unit.test_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/metrics/...`` over the whole held-out split."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/metrics/...`` over the whole test split."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: Literal["val", "test"]) -> None:
        for unit in self.units:
            metrics = unit.val_metrics if stage == "val" else unit.test_metrics
            values = metrics.compute()
            self.log_dict({prefixed(unit.name, f"{stage}/metrics/{name}"): value for name, value in values.items()})
            metrics.reset()

    # --- saving ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the weights alone do not say, as plain values."""
        checkpoint["aen_lightning"] = {
            "n_training_samples": self.n_training_samples,
            "input_scaling": {"kind": self.input_scaling.kind, "factor": self.input_scaling.factor},
            "units": [unit.extra_state() for unit in self.units],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what :meth:`on_save_checkpoint` added."""
        state = checkpoint["aen_lightning"]
        self.n_training_samples = state["n_training_samples"]
        self.input_scaling = InputScaling(**state["input_scaling"])
        for unit, extra in zip(self.units, state["units"], strict=True):
            unit.load_extra_state(extra)

    def export(self, path: str | Path, log_sparsity: Tensor | None = None, *, name: str = "") -> Path:
        """Write one dictionary as a SAELens folder for raw activations; see :func:`aen_lightning.saes.export.export_sae`."""
        return export_sae(self.saes[name], path, input_scaling=self.input_scaling, log_sparsity=log_sparsity)


def _optimizer_class(class_path: str, kwargs: dict[str, Any]) -> type[torch.optim.Optimizer]:
    module_name, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"optimizer must be the class path of a torch optimizer such as 'torch.optim.AdamW', got {class_path!r}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f"optimizer {class_path!r} is not a torch.optim.Optimizer")
    accepted = inspect.signature(found).parameters
    unknown = [key for key in kwargs if key not in accepted]
    if unknown:
        raise ValueError(f"{class_path} takes no argument {unknown[0]!r}; it takes {', '.join(accepted)}")
    return found
