"""The training loop that one SAE and many on one stream have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from sae_lens import TrainingSAE
from torch import Tensor, nn

from aen_lightning import sharded
from aen_lightning.callbacks import (
    DeadFeatureTracker,
    DelayedWarmup,
    EMAWeightRefresh,
    ExportSAE,
    RankWatch,
    SaveOnSignal,
    Throughput,
)
from aen_lightning.callbacks.modules import prefixed
from aen_lightning.saes.export import check_scaling, export_sae
from aen_lightning.saes.input_scaling import InputScaling
from aen_lightning.saes.lengths import Length
from aen_lightning.saes.step_schedule import StepSchedule
from aen_lightning.sparse.precision import MatmulPrecision, set_matmul_precision
from aen_lightning.training.checkpoints import WholeCheckpointIO
from aen_lightning.training.finite import (
    FiniteWatch,
    OnNonFinite,
    require_finite,
)
from aen_lightning.training.hand_back import HandBack
from aen_lightning.training.optimization import SAEOptimization
from aen_lightning.training.optimizer import OptimizerSettings
from aen_lightning.training.progress_bar import show_in_bar
from aen_lightning.training.run_state import RunState
from aen_lightning.training.sharded_features import ShardedFeatures, refuse_model_parallel
from aen_lightning.training.tracked_sae import TrackedSAE


class SAETrainingModule(SAEOptimization, RunState):
    """Trains SAEs on batches of activations, each with its own loss and its gradients clipped on their own.

    Args:
        saes: The SAEs by name; the only one of a run has the empty name.
        dead_feature_window: Training steps, or a share of the run, without firing after which a feature counts as dead in
            ``sparsity/dead_features`` and, in architectures that revive features, gets the auxiliary loss.
        float32_matmul_precision: ``torch.set_float32_matmul_precision`` during a fit on a GPU: ``high`` lets float32
            products run in TF32, ``highest`` does not. None: as it is. Nothing on a CPU.
        compile_sae: Compile the training forward pass with ``torch.compile``; the step is then dense.
        sae_compilation_mode: ``torch.compile``'s mode.
        sae_compilation_backend: ``torch.compile``'s backend; ``inductor`` needs a C++ compiler on a CPU.
        on_non_finite: What a row of activations with a nan or an infinity does. ``stop``: it ends the run, at the
            next logging step or before anything is written, with its step, batch and rank. ``skip``: other rows
            of its batch take its place, and it is counted (``details/n_skipped_rows``). A loss or a weight that is
            not finite always ends the run.
        **optimizer: As for :class:`~aen_lightning.training.optimizer.OptimizerSettings`.

    Attributes:
        run_config: The whole configuration of a command, to be compared when its run is resumed; None: the
            hyper-parameters are.
        accept_changed_config: Resume from a checkpoint of a run with other settings.

    Raises:
        ValueError: For settings that make no sense.
    """

    def __init__(
        self,
        saes: Mapping[str, TrainingSAE[Any]],
        dead_feature_window: Length = 1000,
        float32_matmul_precision: MatmulPrecision | None = "high",
        compile_sae: bool = False,
        sae_compilation_mode: str | None = None,
        sae_compilation_backend: str = "inductor",
        on_non_finite: OnNonFinite = "stop",
        **optimizer: Any,
    ) -> None:
        super().__init__()
        self.sharded_features: ShardedFeatures | None = None
        if dead_feature_window <= 0:
            raise ValueError(
                f"dead_feature_window must be at least 1 step, or a share of the run in (0, 1), got {dead_feature_window}"
            )
        self.optimizer_settings = OptimizerSettings(**optimizer)
        if float32_matmul_precision not in (*get_args(MatmulPrecision), None):
            raise ValueError(
                f"float32_matmul_precision must be one of {', '.join(get_args(MatmulPrecision))} or None, "
                f"got {float32_matmul_precision!r}"
            )
        self.float32_matmul_precision = float32_matmul_precision
        self.compile_sae = compile_sae
        self.sae_compilation_mode, self.sae_compilation_backend = (
            sae_compilation_mode,
            sae_compilation_backend,
        )
        self.tracked = cast(
            "Sequence[TrackedSAE]",
            nn.ModuleList(
                TrackedSAE(sae, name=name, dead_feature_window=dead_feature_window)
                for name, sae in saes.items()
            ),
        )
        self.n_training_samples = 0
        self.n_skipped_rows = 0
        self.finite_watch = FiniteWatch(on_non_finite)
        self.run_config: Mapping[str, Any] | None = None
        self.accept_changed_config = False
        self.input_scaling = InputScaling()
        self.step_schedule = StepSchedule()
        self.bar_values: dict[str, float] = {}
        self._undo: list[Callable[[], None]] = []

    # --- wiring --------------------------------------------------------------------------------------------
    def configure_callbacks(self) -> list[pl.Callback]:
        """The callbacks training needs.

        One of the same class (or a subclass) given to the Trainer takes its place.
        """
        defaults: list[type[pl.Callback]] = [
            HandBack,
            DeadFeatureTracker,
            ExportSAE,
            Throughput,
            SaveOnSignal,
            RankWatch,
        ]
        if self._adaptive_saes():
            defaults = [DelayedWarmup, EMAWeightRefresh, *defaults]
        given = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        return [default() for default in defaults if not any(isinstance(c, default) for c in given)]

    def setup(self, stage: str) -> None:
        """Check the data against each SAE before any work, and take over what they say of themselves."""
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a plugin of the user's stays
            self.trainer.strategy.checkpoint_io = WholeCheckpointIO()
        datamodule = getattr(self.trainer, "datamodule", None)
        d_in = getattr(datamodule, "d_in", None)
        if isinstance(d_in, dict):
            raise ValueError(
                f"{type(self).__name__} trains on one hook, but {type(datamodule).__name__} gives "
                f"{', '.join(d_in)}: "
                "set hook_name to one of them"
            )
        for sae in self.saes.values():
            if d_in is not None and d_in != sae.cfg.d_in:
                raise ValueError(
                    f"the SAE has d_in={sae.cfg.d_in}, but {type(datamodule).__name__} gives activations "
                    f"of width {d_in}: "
                    f"set model.sae.d_in to {d_in}"
                )
        self._adopt_data_description()
        if self.sharded_features is None:
            refuse_model_parallel(self.trainer)
        else:
            self.sharded_features.check(self.trainer, compile_sae=self.compile_sae)
        if self.compile_sae and stage == "fit":
            for tracked in self.tracked:
                tracked.compile(mode=self.sae_compilation_mode, backend=self.sae_compilation_backend)

    def configure_model(self) -> None:
        """With sharded features, make this rank's part of the weights."""
        if self.sharded_features is not None:
            self.sharded_features.make_weights(self.trainer)

    def _adopt_data_description(self) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        scaling = getattr(datamodule, "input_scaling", None)
        if isinstance(scaling, InputScaling):
            self.input_scaling = scaling
        for sae in self.saes.values():
            for key, value in getattr(datamodule, "sae_metadata", {}).items():
                sae.cfg.metadata[key] = value
            check_scaling(sae.cfg, self.input_scaling)

    def on_fit_start(self) -> None:
        """Tell the SAEs where Lightning put them, and settle how their steps are embedded in this run."""
        for sae in self.saes.values():
            # Module.to reaches parameters only; SAELens keeps device and dtype as plain attributes as well.
            sae.to(device=self.device)
            if sae.W_enc.dtype != sae.dtype:
                sae.to(dtype=sae.W_enc.dtype)
        self.finite_watch.begin(self.n_skipped_rows if self.trainer.is_global_zero else 0)
        for tracked in self.tracked:
            tracked.run_steps = self.trainer.estimated_stepping_batches
        self._undo.append(show_in_bar(self.trainer.progress_bar_callback, self.bar_values))
        if self.device.type == "cuda" and self.float32_matmul_precision is not None:
            self._undo.append(set_matmul_precision(self.float32_matmul_precision))
        self.step_schedule = StepSchedule(
            n_micro_batches=self.trainer.accumulate_grad_batches,
            reduce_mean=lambda tensor: self._over_batches(tensor, "mean"),
        )

    def _over_batches(self, tensor: Tensor, op: Literal["mean", "sum"]) -> Tensor:
        """Reduce over the ranks that have other batches; with sharded features there are none."""
        if self.shard_features:
            return tensor
        return cast(Tensor, self.trainer.strategy.reduce(tensor, reduce_op=op))

    def on_train_start(self) -> None:
        """Read the data's description again: an average scale is only known once data have been seen."""
        self._adopt_data_description()

    def hand_back(self) -> None:
        """Leave the SAEs as if this module had never had them; after every fit, also one that raised."""
        self.step_schedule = StepSchedule()
        while self._undo:
            self._undo.pop()()
        for sae in self._adaptive_saes():
            if not self.shard_features:
                sae.W_enc.data = sae.W_enc.data.contiguous()

    # --- steps ---------------------------------------------------------------------------------------------
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        """A SAELens training forward pass of every SAE on the same batch (batch, d_in).

        Returns:
            ``loss`` (scalar, the sum), ``n_firings``: by SAE name, how often each feature fired, shape
            (d_sae,), int64, and ``n_tokens``, an int; counts are over all ranks.
        """
        n_steps, is_logging_step = self.trainer.global_step, self._is_logging_step()
        # equal batches on every rank, as everywhere in a data-parallel step
        n_tokens = len(batch) * (1 if self.shard_features else self.trainer.world_size)
        self.n_training_samples += n_tokens
        for tracked in self.tracked:
            self._check_batch(batch, tracked)
            if self.sharded_features is not None:
                self.sharded_features.compare_first(batch)
        batch = self.finite_watch.rows(batch, step=n_steps, batch_idx=batch_idx)
        losses, n_firings, logs = [], {}, {}
        for tracked in self.tracked:
            output = tracked.training_forward_pass(
                batch, self.step_schedule, n_training_steps=n_steps, is_logging_step=is_logging_step
            )
            losses.append(output.loss)
            with torch.no_grad():
                n_firings[tracked.name] = self._over_batches(tracked.firing_counts(output), "sum")
                tracked.note_firings(n_firings[tracked.name])
                if is_logging_step:
                    logs[tracked.name] = tracked.log_values(output, n_steps)
        # of one SAE without operations of its own; what a compiled step returns it may write anew in the next
        alone = len(losses) == 1 and not self.compile_sae
        stacked = losses[0].view(1) if alone else torch.stack(losses)
        self.finite_watch.losses(stacked, step=n_steps, batch_idx=batch_idx)
        if is_logging_step:
            self.check_finite(batch_size=len(batch))
            self._log_training(logs)
        loss = losses[0] if len(losses) == 1 else stacked.sum()
        return {"loss": loss, "n_firings": n_firings, "n_tokens": n_tokens}

    def _check_batch(self, batch: Tensor, tracked: TrackedSAE) -> None:
        d_in = tracked.sae.cfg.d_in
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
        if self.finite_watch.mode == "skip":
            self.log("details/n_skipped_rows", float(self.n_skipped_rows))

        def mean(key: str) -> Tensor:
            return torch.stack([values[key].float() for values in logs.values()]).mean()

        dead = [
            logs[tracked.name]["sparsity/dead_features"] / tracked.sae.cfg.d_sae for tracked in self.tracked
        ]
        bar = {
            "loss": mean("losses/overall_loss"),
            "l0": mean("metrics/l0"),
            "ev": mean("metrics/explained_variance"),
            "dead%": 100 * torch.stack(dead).mean(),
        }
        # not with prog_bar=True: Lightning would fetch each value from the device again at every later step
        self.log_dict(bar, logger=False)
        self.bar_values.update(zip(bar, torch.stack(list(bar.values())).tolist(), strict=True))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Update the held-out metrics; no SAE's state changes."""
        rows = self._held_out(batch, batch_idx)
        for tracked in self.tracked:
            self._check_batch(rows, tracked)
            tracked.evaluate(rows, tracked.val_metrics)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """As :meth:`validation_step`, for the test split."""
        rows = self._held_out(batch, batch_idx)
        for tracked in self.tracked:
            self._check_batch(rows, tracked)
            tracked.evaluate(rows, tracked.test_metrics)

    def _held_out(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.finite_watch.held_out_rows(batch, batch_idx=batch_idx, rank=self.trainer.global_rank)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/metrics/...`` over the whole held-out split."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/metrics/...`` over the whole test split."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: Literal["val", "test"]) -> None:
        for tracked in self.tracked:
            metrics = tracked.val_metrics if stage == "val" else tracked.test_metrics
            values = metrics.compute()
            self.log_dict(
                {prefixed(tracked.name, f"{stage}/metrics/{name}"): value for name, value in values.items()}
            )
            metrics.reset()

    def export(self, path: str | Path, log_sparsity: Tensor | None = None, *, name: str = "") -> Path:
        """Write one dictionary as a SAELens folder for raw activations.

        See :func:`aen_lightning.saes.export.export_sae`; with sharded features every rank must call it.

        Raises:
            NonFiniteError: If it holds numbers that are not finite.
        """
        if (
            not self.shard_features
        ):  # else one rank alone must not leave; all have looked together before this
            require_finite(self.saes[name], f"the SAE {name!r}" if name else "the SAE")
        write = sharded.export_sharded_sae if self.shard_features else export_sae
        return write(self.saes[name], path, input_scaling=self.input_scaling, log_sparsity=log_sparsity)
