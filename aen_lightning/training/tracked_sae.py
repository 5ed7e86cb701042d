"""One SAE in training: the SAE, its counters and its metrics. A LightningModule drives one or several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from sae_lens import TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from sae_lens.training.optim import CoefficientScheduler
from sae_lens.util import temporary_seed
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from aen_lightning.metrics import L0, MSE, DeadFeatures, ExplainedVariance, ShrinkageRatio, firing_counts
from aen_lightning.saes.aen import AENTrainingSAE
from aen_lightning.saes.lengths import Length, check_length, in_steps
from aen_lightning.saes.relaxed import RelaxedTrainingSAE
from aen_lightning.saes.step_output import CodedStepOutput
from aen_lightning.saes.step_schedule import StepSchedule
from aen_lightning.sharded import FeatureSharded
from aen_lightning.training.dead_bound import DeadBound


def new_sae(cfg: TrainingSAEConfig, seed: int | None) -> TrainingSAE[Any]:
    """An untrained SAE of any SAELens architecture.

    ``seed`` is of its initial weights, None: the global generator.
    """
    with temporary_seed(seed):
        return cast("TrainingSAE[Any]", TrainingSAE.from_dict(cfg.to_dict()))


class TrackedSAE(nn.Module):
    """One SAE with what its training needs besides its weights.

    Args:
        sae: Training SAE of any SAELens architecture.
        name: Prefix of its log keys and name of its export folder; empty for the only SAE of a run.
        dead_feature_window: Training steps without firing after which a feature counts as dead, or a share of
            the run.
    """

    run_steps: float | None = None
    """Length of the run, which lengths that are shares need; set by who drives."""

    n_forward_passes_since_fired: Tensor
    sparsity_multiplier: Tensor

    def __init__(self, sae: TrainingSAE[Any], *, name: str, dead_feature_window: Length) -> None:
        super().__init__()
        check_length(dead_feature_window, "dead_feature_window")
        cfg = sae.cfg
        self.name = name
        self.dead_feature_window = dead_feature_window
        self.sae = sae
        self.dead_bound = DeadBound()
        self.register_buffer("sparsity_multiplier", torch.ones(()))
        self.register_buffer("n_forward_passes_since_fired", torch.zeros(cfg.d_sae, dtype=torch.int64))
        self.train_metrics = _metrics(cfg.d_in)
        self.val_metrics = _metrics(cfg.d_in, cfg.d_sae)
        self.test_metrics = _metrics(cfg.d_in, cfg.d_sae)
        self._compiled_forward_pass: Callable[..., TrainStepOutput] | None = None

    @property
    def dead_neuron_mask(self) -> Tensor:
        """Features that have not fired for ``dead_feature_window`` training steps, shape (d_sae,), bool."""
        return self.n_forward_passes_since_fired > self._dead_window

    @property
    def revived_neuron_mask(self) -> Tensor:
        """Features that get the auxiliary loss: the dead ones, or those silent for the SAE's own window."""
        return self.n_forward_passes_since_fired > self._revival_window

    @property
    def _revives(self) -> bool:
        """Whether a step of the SAE may ask who is dead."""
        cfg = self.sae.cfg
        own = isinstance(self.sae, AENTrainingSAE)
        return not own or (cfg.hard_k is not None and bool(cfg.aux_loss_coefficient))

    @property
    def _dead_window(self) -> int:
        return in_steps(self.dead_feature_window, self.run_steps, "dead_feature_window")

    @property
    def _revival_window(self) -> int:
        own = getattr(self.sae.cfg, "aux_loss_window", None)
        return self._dead_window if own is None else in_steps(own, self.run_steps, "aux_loss_window")

    def coefficients(self, n_training_steps: int) -> dict[str, Any]:
        """SAELens's loss coefficients after ``n_training_steps`` finished steps, warm-up and multiplier
        included.

        A number each, those of sparsity (``l1``, ``l0``) a scalar tensor, so that a multiplier on a GPU is
        never waited for.
        """
        values: dict[str, Any] = {}
        for name, cfg in self.sae.get_coefficients().items():
            value, warm_up = cfg if isinstance(cfg, TrainCoefficientConfig) else (cfg, 0)
            steps = in_steps(warm_up, self.run_steps, f"the warm-up of {name}")
            scheduler = CoefficientScheduler(warm_up_steps=steps, final_value=value)
            scheduler.load_state_dict({"current_step": n_training_steps})
            values[name] = (
                scheduler.value * self.sparsity_multiplier if name in ("l1", "l0") else scheduler.value
            )
        return values

    def compile(self, *, mode: str | None, backend: str) -> None:
        """Compile the training forward pass; a second call does nothing. The SAE itself stays as it is."""
        if self._compiled_forward_pass is None:
            self._compiled_forward_pass = torch.compile(self._forward_pass, mode=mode, backend=backend)

    def training_forward_pass(
        self, x: Tensor, schedule: StepSchedule, *, n_training_steps: int, is_logging_step: bool
    ) -> TrainStepOutput:
        """SAELens's training forward pass on a batch (batch, d_in)."""
        dead = None
        if self._revives:
            dead = self.revived_neuron_mask
            if isinstance(self.sae, AENTrainingSAE):
                at_most = self.dead_bound.next_step(self.n_forward_passes_since_fired, self._revival_window)
                schedule = replace(schedule, n_dead_at_most=at_most)
        step_input = TrainStepInput(
            sae_in=x,
            coefficients=self.coefficients(n_training_steps),
            dead_neuron_mask=dead,
            n_training_steps=n_training_steps,
            is_logging_step=is_logging_step,
        )
        return (self._compiled_forward_pass or self._forward_pass)(step_input, schedule)

    def _forward_pass(self, step_input: TrainStepInput, schedule: StepSchedule) -> TrainStepOutput:
        if isinstance(self.sae, AENTrainingSAE):
            return self.sae.scheduled_forward_pass(step_input, schedule)
        return self.sae.training_forward_pass(step_input)

    def firing_counts(self, output: TrainStepOutput) -> Tensor:
        """How often each feature fired in this rank's batch, shape (d_sae,), int64."""
        if isinstance(self.sae, FeatureSharded):
            return self.sae.whole_firing_counts(output.feature_acts)
        if isinstance(output, CodedStepOutput):
            return output.code.feature_counts
        return firing_counts(output.feature_acts)

    def note_firings(self, n_firings: Tensor) -> None:
        """Restart the count of silent steps for the features that fired, over all ranks."""
        self.n_forward_passes_since_fired.add_(1).masked_fill_(n_firings > 0, 0)

    def log_values(self, output: TrainStepOutput, n_training_steps: int) -> dict[str, Any]:
        """What SAELens logs of a step, under its keys.

        Collective: every rank must call it at the same steps.
        """
        self._update(self.train_metrics, output.sae_in, output.sae_out, output.feature_acts)
        values = self.train_metrics.compute()
        self.train_metrics.reset()
        log: dict[str, Any] = {f"metrics/{name}": value for name, value in values.items()}
        log |= {f"losses/{name}": value.detach() for name, value in output.losses.items()}
        log["losses/overall_loss"] = output.loss.detach()
        log |= {f"metrics/{name}": v() if callable(v) else v for name, v in output.metrics.items()}
        log["sparsity/dead_features"] = self.dead_neuron_mask.sum().float()
        log["sparsity/mean_passes_since_fired"] = self.n_forward_passes_since_fired.float().mean()
        log |= {f"details/{name}_coefficient": v for name, v in self.coefficients(n_training_steps).items()}
        return log

    def evaluate(self, x: Tensor, metrics: MetricCollection) -> None:
        """Update held-out ``metrics`` with a batch (batch, d_in); the SAE's state stays as it is."""
        feature_acts = self.sae.encode(x)
        self._update(metrics, x, self.sae.decode(feature_acts), feature_acts)

    def _update(self, metrics: MetricCollection, x: Tensor, x_hat: Tensor, feature_acts: Tensor) -> None:
        if isinstance(self.sae, FeatureSharded):  # metrics add over ranks: give each its share of the tokens
            x, x_hat, feature_acts = self.sae.parts.token_share(x, x_hat, feature_acts=feature_acts)
        metrics.update(x=x, x_hat=x_hat, feature_acts=feature_acts)

    def begin_refit(self) -> None:
        """Go on with the refit of the SAE: its support kept, its magnitudes and decoder trained without a penalty."""
        self.sae = RelaxedTrainingSAE.of_training(self.sae)

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint needs besides tensors, as plain values."""
        state: dict[str, Any] = {
            "metadata": self.sae.cfg.metadata.to_dict(),
            "in_refit": isinstance(self.sae, RelaxedTrainingSAE),
        }
        if isinstance(self.sae, AENTrainingSAE):
            state["density_switch"] = self.sae.density_switch.state_dict()
            state["hard_k"], state["hard_finish"] = self.sae.cfg.hard_k, self.sae.cfg.hard_finish
            state["dead_bound"] = self.dead_bound.state_dict()
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`extra_state`, before the weights are."""
        if state.get("in_refit", False) and not isinstance(self.sae, RelaxedTrainingSAE):
            self.begin_refit()
        for key, value in state["metadata"].items():
            self.sae.cfg.metadata[key] = value
        if isinstance(self.sae, AENTrainingSAE):
            self.sae.density_switch.load_state_dict(state["density_switch"])
            self.sae.cfg.hard_k = state["hard_k"]
            self.sae.prepare_hard_phase(
                state.get("hard_finish", "batchtopk")
            )  # absent: of an earlier version
            self.dead_bound = DeadBound()
            if "dead_bound" in state:  # absent: of an earlier version
                self.dead_bound.load_state_dict(state["dead_bound"])


def _metrics(d_in: int, d_sae: int | None = None) -> MetricCollection:
    metrics: dict[str, Metric | MetricCollection] = {
        "l0": L0(),
        "explained_variance": ExplainedVariance(d_in),
        "mse": MSE(),
        "shrinkage_ratio": ShrinkageRatio(),
    }
    if d_sae is not None:
        metrics["dead_features_pct"] = DeadFeatures(d_sae)
    return MetricCollection(metrics, compute_groups=False)
