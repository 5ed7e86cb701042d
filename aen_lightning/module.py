"""SAEModule: a LightningModule that trains any SAELens training SAE."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sae_lens import TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from sae_lens.training.optim import CoefficientScheduler, get_lr_scheduler
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from aen_lightning.callbacks import DeadFeatureTracker, DelayedWarmup, EMAWeightRefresh, ExportSAE, Throughput
from aen_lightning.config import build_sae_config
from aen_lightning.data.scaling import InputScaling
from aen_lightning.export import check_scaling, export_sae
from aen_lightning.metrics import L0, MSE, DeadFeatures, ExplainedVariance, ShrinkageRatio, firing_counts
from aen_lightning.sae import AENTrainingSAE

_PROGRESS_BAR = {"metrics/l0": "l0", "metrics/explained_variance": "ev"}


class SAEModule(pl.LightningModule):
    """Trains an SAE on batches of activations, shape (batch, d_in), with Lightning's Trainer.

    Any architecture SAELens can train runs here, in the same loop and on the same data: ``aen``, ``standard``, ``topk``,
    ``batchtopk``, ``jumprelu``, ``gated``, ``matryoshka_batchtopk``, ... Gradient clipping, precision, accumulation, loggers and
    strategies are the Trainer's. With Adam, a constant rate and ``gradient_clip_val=1.0`` it takes the very steps that
    SAELens's ``SAETrainer`` takes.

    Args:
        sae: ``architecture`` and the fields of its SAELens training config; unknown keys are refused. For ``aen`` also the
            paper's ``lambda_1`` and ``lambda_2``.
        lr: Learning rate.
        optimizer: Class path of a ``torch.optim.Optimizer`` that takes ``params, lr=...``.
        optimizer_kwargs: Further arguments of the optimizer. Adam and AdamW run fused (not in mixed precision) unless
            ``fused`` is given.
        lr_scheduler_name: SAELens's ``constant``, ``cosineannealing`` or ``cosineannealingwarmrestarts``.
        lr_warm_up_steps: Optimizer steps of linear warm-up.
        lr_decay_steps: Optimizer steps of linear decay to zero at the end; needs ``max_steps`` on the Trainer.
        lr_end: Rate at the end of a cosine schedule. None: a tenth of ``lr``, as in SAELens.
        n_restart_cycles: Cycles of ``cosineannealingwarmrestarts``.
        dead_feature_window: Training steps without firing after which a feature counts as dead in ``sparsity/dead_features``
            and, in architectures that revive features, gets the auxiliary loss.
        compile_sae: Compile the training forward pass with ``torch.compile``.
        sae_compilation_mode: ``torch.compile``'s mode.
        sae_compilation_backend: ``torch.compile``'s backend; ``inductor`` needs a C++ compiler on a CPU.

    Raises:
        ValueError: For a config that does not hold together; at ``setup``, if the data do not fit the SAE.
    """

    def __init__(
        self,
        sae: dict[str, Any],
        lr: float = 1e-3,
        optimizer: str = "torch.optim.Adam",
        optimizer_kwargs: dict[str, Any] | None = None,
        lr_scheduler_name: Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"] = "constant",
        lr_warm_up_steps: int = 0,
        lr_decay_steps: int = 0,
        lr_end: float | None = None,
        n_restart_cycles: int = 1,
        dead_feature_window: int = 1000,
        compile_sae: bool = False,
        sae_compilation_mode: str | None = None,
        sae_compilation_backend: str = "inductor",
    ) -> None:
        super().__init__()
        cfg = build_sae_config(sae)
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        self.optimizer_class = _optimizer_class(optimizer, optimizer_kwargs or {})
        self.save_hyperparameters()  # plain values only, so that checkpoints load with weights_only
        self.sae = cast("TrainingSAE[Any]", TrainingSAE.from_dict(cfg.to_dict()))
        self.n_forward_passes_since_fired: Tensor
        self.register_buffer("n_forward_passes_since_fired", torch.zeros(cfg.d_sae, dtype=torch.int64))
        self.n_training_samples = 0
        self.input_scaling = InputScaling()
        self.train_metrics = self._make_metrics(with_dead=False)
        self.val_metrics = self._make_metrics(with_dead=True)
        self.test_metrics = self._make_metrics(with_dead=True)

    @classmethod
    def from_config(cls, cfg: TrainingSAEConfig, **kwargs: Any) -> SAEModule:
        """The module for a SAELens training config object; ``kwargs`` are the other constructor arguments."""
        return cls(sae={**cfg.to_dict(), "metadata": {}}, **kwargs)

    def _make_metrics(self, with_dead: bool) -> MetricCollection:
        d_in, d_sae = self.sae.cfg.d_in, self.sae.cfg.d_sae
        metrics: dict[str, Metric | MetricCollection] = {
            "l0": L0(),
            "explained_variance": ExplainedVariance(d_in),
            "mse": MSE(),
            "shrinkage_ratio": ShrinkageRatio(),
        }
        if with_dead:
            metrics["dead_features_pct"] = DeadFeatures(d_sae)
        return MetricCollection(metrics, compute_groups=False)

    # --- wiring ---------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[pl.Callback]:
        """The callbacks training needs; one of the same class (or a subclass) given to the Trainer takes its place."""
        defaults: list[type[pl.Callback]] = [DeadFeatureTracker, ExportSAE, Throughput]
        if isinstance(self.sae, AENTrainingSAE):
            defaults = [DelayedWarmup, EMAWeightRefresh, *defaults]
        given = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        return [default() for default in defaults if not any(isinstance(c, default) for c in given)]

    def setup(self, stage: str) -> None:
        """Check the data against the SAE before any work, and take over what it says of itself."""
        datamodule = getattr(self.trainer, "datamodule", None)
        d_in = getattr(datamodule, "d_in", None)
        if isinstance(d_in, dict):
            raise ValueError(
                f"SAEModule trains one SAE on one hook, but {type(datamodule).__name__} gives {', '.join(d_in)}: "
                "set hook_name to one of them"
            )
        if d_in is not None and d_in != self.sae.cfg.d_in:
            raise ValueError(
                f"the SAE has d_in={self.sae.cfg.d_in}, but {type(datamodule).__name__} gives activations of width {d_in}: "
                f"set model.sae.d_in to {d_in}"
            )
        self._adopt_data_description()
        if isinstance(self.sae, AENTrainingSAE):
            self.sae.reduce_mean = self._reduce_mean
        if self.hparams["compile_sae"] and stage == "fit":
            self.sae.training_forward_pass = torch.compile(
                self.sae.training_forward_pass,
                mode=self.hparams["sae_compilation_mode"],
                backend=self.hparams["sae_compilation_backend"],
            )

    def _adopt_data_description(self) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        scaling = getattr(datamodule, "input_scaling", None)
        if isinstance(scaling, InputScaling):
            self.input_scaling = scaling
        for key, value in getattr(datamodule, "sae_metadata", {}).items():
            self.sae.cfg.metadata[key] = value
        check_scaling(self.sae.cfg, self.input_scaling)

    def _reduce_mean(self, tensor: Tensor) -> Tensor:
        return cast(Tensor, self.trainer.strategy.reduce(tensor, reduce_op="mean"))

    def on_fit_start(self) -> None:
        """Tell the SAE where Lightning put it, and that callbacks now schedule its adaptive state."""
        # Module.to reaches parameters only; SAELens keeps device and dtype as plain attributes as well.
        self.sae.to(device=self.device)
        if self.sae.W_enc.dtype != self.sae.dtype:
            self.sae.to(dtype=self.sae.W_enc.dtype)
        if isinstance(self.sae, AENTrainingSAE):
            self.sae.scheduled_externally = True
            self.sae.micro_batches_per_step = self.trainer.accumulate_grad_batches

    def on_train_start(self) -> None:
        """Read the data's description again: an average scale is only known once data have been seen."""
        self._adopt_data_description()

    def on_fit_end(self) -> None:
        """Hand the schedule back, so that the SAE trains as well under SAELens's own trainer."""
        if isinstance(self.sae, AENTrainingSAE):
            self.sae.scheduled_externally = False
            self.sae.micro_batches_per_step = 1

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and SAELens's learning-rate schedule, stepped once per optimizer step."""
        h = self.hparams
        arguments: dict[str, Any] = {"lr": h["lr"], **(h["optimizer_kwargs"] or {})}
        # Adam's fused kernel takes the same steps several times faster; Lightning does not clip with it in mixed precision
        if self.optimizer_class in (torch.optim.Adam, torch.optim.AdamW) and "mixed" not in str(self.trainer.precision):
            arguments.setdefault("fused", self.device.type in ("cpu", "cuda"))
        optimizer = self.optimizer_class(self.sae.parameters(), **arguments)
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

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer's step, then the decoder rows back to unit norm."""
        super().optimizer_step(*args, **kwargs)
        if isinstance(self.sae, AENTrainingSAE):
            self.sae.normalize_decoder()

    # --- steps ----------------------------------------------------------------------------------------------------

    @property
    def dead_neuron_mask(self) -> Tensor:
        """Features that have not fired for ``dead_feature_window`` training steps, shape (d_sae,), bool."""
        return self.n_forward_passes_since_fired > self.hparams["dead_feature_window"]

    def coefficients(self, n_training_steps: int) -> dict[str, float]:
        """SAELens's loss coefficients after ``n_training_steps`` finished steps, warm-up included."""
        values = {}
        for name, cfg in self.sae.get_coefficients().items():
            value, warm_up = cfg if isinstance(cfg, TrainCoefficientConfig) else (cfg, 0)
            scheduler = CoefficientScheduler(warm_up_steps=warm_up, final_value=value)
            scheduler.load_state_dict({"current_step": n_training_steps})
            values[name] = scheduler.value
        return values

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """One SAELens training forward pass.

        Returns:
            ``loss`` (scalar), and over all ranks ``n_firings``, shape (d_sae,), int64, how often each feature fired, and
            ``n_tokens``, an int64 scalar.
        """
        self._check_batch(batch)
        n_steps = self.trainer.global_step
        output = self.sae.training_forward_pass(
            TrainStepInput(
                sae_in=batch,
                coefficients=self.coefficients(n_steps),
                dead_neuron_mask=self.dead_neuron_mask,
                n_training_steps=n_steps,
                is_logging_step=self._is_logging_step(),
            )
        )
        with torch.no_grad():
            n_firings, n_tokens = self._count_firings(output.feature_acts)
            if self._is_logging_step():
                self._log_training(output)
        return {"loss": output.loss, "n_firings": n_firings, "n_tokens": n_tokens}

    def _check_batch(self, batch: Tensor) -> None:
        d_in = self.sae.cfg.d_in
        if not isinstance(batch, Tensor) or batch.ndim != 2 or batch.shape[-1] != d_in:
            got = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(
                f"SAEModule trains on batches of shape (batch, d_in={d_in}), got {got}; "
                "flatten (batch, context, d_in) first"
            )

    def _count_firings(self, feature_acts: Tensor) -> tuple[Tensor, Tensor]:
        n_firings = cast(Tensor, self.trainer.strategy.reduce(firing_counts(feature_acts), reduce_op="sum"))
        # equal batches on every rank, as everywhere in a data-parallel step
        n_tokens = feature_acts.shape[0] * self.trainer.world_size
        self.n_training_samples += n_tokens
        self.n_forward_passes_since_fired.add_(1).masked_fill_(n_firings > 0, 0)
        return n_firings, torch.tensor(n_tokens)

    def _is_logging_step(self) -> bool:
        step = self.trainer.global_step
        return step == 0 or (step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # set by a connector

    def _log_training(self, output: TrainStepOutput) -> None:
        # collective under DDP, and every rank logs at the same steps
        self.train_metrics.update(x=output.sae_in, x_hat=output.sae_out, feature_acts=output.feature_acts)
        values = self.train_metrics.compute()
        self.train_metrics.reset()
        log = {f"metrics/{name}": value for name, value in values.items()}
        log |= {f"losses/{name}": value.detach() for name, value in output.losses.items()}
        log["losses/overall_loss"] = output.loss.detach()
        log |= {f"metrics/{name}": v() if callable(v) else v for name, v in output.metrics.items()}
        n_dead = self.dead_neuron_mask.sum()
        log["sparsity/dead_features"] = n_dead.float()
        log["sparsity/mean_passes_since_fired"] = self.n_forward_passes_since_fired.float().mean()
        log["details/n_training_samples"] = float(self.n_training_samples)
        log["details/current_learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        log |= {f"details/{name}_coefficient": v for name, v in self.coefficients(self.trainer.global_step).items()}
        self.log_dict(log, sync_dist=True)
        bar = {short: log[key] for key, short in _PROGRESS_BAR.items()}
        bar |= {"loss": log["losses/overall_loss"], "dead%": 100 * n_dead / self.sae.cfg.d_sae}
        self.log_dict(bar, prog_bar=True, logger=False)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Update the held-out metrics; the SAE's state stays as it is."""
        self._evaluation_step(batch, self.val_metrics)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """As :meth:`validation_step`, for the test split."""
        self._evaluation_step(batch, self.test_metrics)

    def _evaluation_step(self, batch: Tensor, metrics: MetricCollection) -> None:
        self._check_batch(batch)
        feature_acts = self.sae.encode(batch)
        x_hat = self.sae.decode(feature_acts)
        metrics.update(x=batch, x_hat=x_hat, feature_acts=feature_acts)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/metrics/...`` over the whole held-out split."""
        self._log_evaluation("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log ``test/metrics/...`` over the whole test split."""
        self._log_evaluation("test", self.test_metrics)

    def _log_evaluation(self, stage: str, metrics: MetricCollection) -> None:
        self.log_dict({f"{stage}/metrics/{name}": value for name, value in metrics.compute().items()})
        metrics.reset()

    # --- saving ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the weights alone do not say, as plain values."""
        checkpoint["aen_lightning"] = {
            "n_training_samples": self.n_training_samples,
            "input_scaling": {"kind": self.input_scaling.kind, "factor": self.input_scaling.factor},
            "metadata": self.sae.cfg.metadata.to_dict(),
        }
        if isinstance(self.sae, AENTrainingSAE):
            checkpoint["aen_lightning"]["density_switch"] = self.sae.density_switch.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what :meth:`on_save_checkpoint` added."""
        state = checkpoint["aen_lightning"]
        self.n_training_samples = state["n_training_samples"]
        self.input_scaling = InputScaling(**state["input_scaling"])
        for key, value in state["metadata"].items():
            self.sae.cfg.metadata[key] = value
        if isinstance(self.sae, AENTrainingSAE):
            self.sae.density_switch.load_state_dict(state["density_switch"])

    def export(self, path: str | Path, log_sparsity: Tensor | None = None) -> Path:
        """Write the dictionary as a SAELens folder for raw activations; see :func:`aen_lightning.export.export_sae`."""
        return export_sae(self.sae, path, input_scaling=self.input_scaling, log_sparsity=log_sparsity)


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
