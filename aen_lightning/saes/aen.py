"""AEN-SAE as a SAELens architecture: configs, the inference class and the training class (arXiv:2605.05341).

At inference an AEN-SAE *is* a ReLU SAE, so it is exported as ``standard`` unless asked otherwise and then loads
without this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens import (
    SAE,
    StandardSAE,
    TrainingSAE,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEConfig, TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from aen_lightning import sparse
from aen_lightning.saes.aen_config import ARCHITECTURE, AENSAEConfig, AENTrainingSAEConfig
from aen_lightning.saes.penalty import adaptive_weights, elastic_net_terms, starvation_guard, warmup_ramp
from aen_lightning.saes.step_schedule import StepSchedule

# Training state that no inference architecture knows: dropped when a dictionary is exported.
_STATE_BUFFERS = ("feature_acts_ema", "firing_rate_ema", "l1_weights", "ramp", "decoder_norm", "n_observed_steps")
# Of these, the ones that must keep at least float32 when the SAE itself is cast to half precision.
_FLOAT_STATE_BUFFERS = _STATE_BUFFERS[:-1]


class AENSAE(StandardSAE):
    """AEN-SAE at inference: ``relu((x - b_dec) @ W_enc + b_enc)``, then ``h @ W_dec + b_dec``."""


class AENTrainingSAE(TrainingSAE[AENTrainingSAEConfig]):
    """Trains an AEN-SAE; owns the adaptive state and the operations on it.

    State (buffers of at least float32, saved with the training SAE, dropped on export):
        feature_acts_ema: ``m``, shape (d_sae,), running mean of each feature's activation; starts at 1.
        firing_rate_ema: Shape (d_sae,), running firing rates, up to a common factor, as they start at 0; only with a starvation guard.
        l1_weights: ``u``, shape (d_sae,), the weights that enter the loss; start at 1.
        ramp: Scalar in [0, 1], how far the adaptive weights are let in.
        decoder_norm: Shape (d_sae,), the L2 norm that each decoder row is held to; 1 until a scaling is folded in.
        n_observed_steps: Scalar int64, training steps observed.

    Under SAELens's trainer, which has no hooks, :meth:`training_forward_pass` schedules all of it from the config. A driver that
    has hooks (our LightningModules) calls :meth:`set_ramp` and :meth:`normalize_decoder` itself and hands each batch to
    :meth:`scheduled_forward_pass` with a :class:`StepSchedule`. In eval mode no state changes.
    """

    b_enc: nn.Parameter
    feature_acts_ema: Tensor
    firing_rate_ema: Tensor | None
    l1_weights: Tensor
    ramp: Tensor
    decoder_norm: Tensor
    n_observed_steps: Tensor

    def __init__(self, cfg: AENTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        dtype = _state_dtype(self.dtype)

        def ones(*shape: int) -> Tensor:
            return torch.ones(shape, dtype=dtype, device=self.device)

        self.register_buffer("feature_acts_ema", ones(cfg.d_sae))
        self.register_buffer(
            "firing_rate_ema", torch.zeros_like(self.feature_acts_ema) if cfg.starvation_guard else None
        )
        self.register_buffer("l1_weights", ones(cfg.d_sae))
        self.register_buffer("ramp", ones())
        self.register_buffer("decoder_norm", ones(cfg.d_sae))
        self.register_buffer("n_observed_steps", torch.zeros((), dtype=torch.int64, device=self.device))
        self.density_switch = sparse.DensitySwitch()

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        b_enc = torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        if self.cfg.decoder_init_norm is None:
            # nn.Linear's default is uniform in +-1/sqrt(fan_in), for weight and bias alike.
            enc_bound, dec_bound = self.cfg.d_in**-0.5, self.cfg.d_sae**-0.5
            nn.init.uniform_(self.W_enc, -enc_bound, enc_bound)
            nn.init.uniform_(b_enc, -enc_bound, enc_bound)
            nn.init.uniform_(self.W_dec, -dec_bound, dec_bound)
        self.b_enc = nn.Parameter(b_enc)
        with torch.no_grad():
            self.W_dec.div_(self.get_W_dec_norm().unsqueeze(1))

    # --- operations on the adaptive state -------------------------------------------------------------------------

    @torch.no_grad()
    def observe(
        self, mean_feature_acts: Tensor, firing_rates: Tensor | None = None, *, n_micro_batches: int = 1
    ) -> None:
        """Move the running means towards this batch: ``m <- beta m + (1 - beta) mean_b |h_b|``, firing rates likewise.

        Args:
            mean_feature_acts: Mean activation of each feature over the batch of all ranks, shape (d_sae,).
            firing_rates: Share of that batch on which each feature fired, likewise; needed with a starvation guard only.
            n_micro_batches: See :class:`StepSchedule`.
        """
        if self.firing_rate_ema is not None:
            assert firing_rates is not None
            self.firing_rate_ema.lerp_(firing_rates, 1 - self.cfg.guard_decay ** (1 / n_micro_batches))
        decay = self.cfg.ema_decay ** (1 / n_micro_batches)
        self.feature_acts_ema.mul_(decay).add_(mean_feature_acts.to(self.feature_acts_ema.dtype), alpha=1 - decay)
        self.n_observed_steps.add_(1)

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Recompute the weights that enter the loss: ``u = 1 + (w - 1) * ramp``, times the starvation guard's factors if it is on."""
        weights = adaptive_weights(
            self.feature_acts_ema,
            gamma=self.cfg.gamma,
            reference_fraction=self.cfg.reference_fraction,
            weight_min=self.cfg.weight_min,
            weight_max=self.cfg.weight_max,
        )
        self.l1_weights.copy_(1 + (weights - 1) * self.ramp)
        if self.firing_rate_ema is not None:
            self.l1_weights.mul_(self._guard(self.firing_rate_ema))

    def _guard(self, firing_rates: Tensor) -> Tensor:
        return starvation_guard(firing_rates, fraction=self.cfg.starvation_guard, minimum=self.cfg.guard_min)

    @torch.no_grad()
    def set_ramp(self, ramp: float) -> None:
        """Let the adaptive weights in by ``ramp``, a number in [0, 1], from the next refresh on."""
        if not 0 <= ramp <= 1:
            raise ValueError(f"ramp must be in [0, 1], got {ramp}")
        self.ramp.fill_(ramp)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Project the decoder rows back to their norm (1 until a scaling is folded in)."""
        if self.W_dec.dtype == self.decoder_norm.dtype:
            self.W_dec.mul_(self._row_scale(self.W_dec))
        else:
            self.W_dec.copy_(self._normalized(self.W_dec))

    def _row_scale(self, W_dec: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(W_dec.detach(), dim=-1, keepdim=True).clamp_min(1e-12)
        scale = self.decoder_norm.unsqueeze(1) / norm
        # a row that is right to rounding stays as it is, so that projecting twice, as an export does, changes nothing
        right = (scale - 1).abs() <= 8 * torch.finfo(scale.dtype).eps
        return scale.masked_fill(right, 1.0)

    def _normalized(self, W_dec: Tensor) -> Tensor:
        exact = W_dec.detach().to(self.decoder_norm.dtype)
        return (exact * self._row_scale(exact)).to(W_dec.dtype)

    # --- training -------------------------------------------------------------------------------------------------

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {
            "l1": TrainCoefficientConfig(value=self.cfg.l1_coefficient, warm_up_steps=self.cfg.l1_warmup_steps),
            "l2": self.cfg.l2_coefficient,
        }

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sae_in = self.process_sae_in(x)
        hidden_pre = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(self.activation_fn(hidden_pre)), hidden_pre

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """``l1_loss`` and ``l2_loss``, each with its coefficient; reads the state and never writes it."""
        l1, l2 = elastic_net_terms(feature_acts, self.l1_weights)
        return {"l1_loss": step_input.coefficients["l1"] * l1, "l2_loss": step_input.coefficients["l2"] * l2}

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One training step's forward under a trainer without hooks, such as SAELens's: the schedule is the config's.

        Args:
            step_input: ``sae_in`` of shape (batch, d_in); ``n_training_steps`` counts the steps finished before this one.
        """
        if self.training:
            self.normalize_decoder()
            self.set_ramp(self.scheduled_ramp(step_input.n_training_steps + 1))
        return self.scheduled_forward_pass(step_input, StepSchedule())

    def scheduled_forward_pass(self, step_input: TrainStepInput, schedule: StepSchedule) -> TrainStepOutput:
        """Encode, observe, refresh the weights, then the loss (paper, sections 2 and 3); in eval mode without the middle two.

        Once few enough features fire, all of it is computed on the non-zeros of the code, with the same result to rounding;
        ``feature_acts`` of the output is then a coalesced COO tensor.

        Args:
            step_input: ``sae_in`` of shape (batch, d_in).
            schedule: What the driver decides.
        """
        if self.sparse_step_applies() and self.density_switch.sparse:
            return self._sparse_forward_pass(step_input, schedule)
        feature_acts, hidden_pre = self.encode_with_hidden_pre(step_input.sae_in)
        sae_out = self.decode(feature_acts)
        if self.training and self.sparse_step_applies():
            self.density_switch.observe(sparse.DenseCode(feature_acts.detach()))
        counts = None if self.firing_rate_ema is None else feature_acts.detach().count_nonzero(dim=0)
        # h >= 0, so |h| is h; the mean is taken in at least float32 since a bf16 mean over a batch loses rare features.
        self._observe_and_refresh(
            feature_acts.detach().mean(dim=0, dtype=self.feature_acts_ema.dtype), counts, len(feature_acts), schedule
        )
        mse_loss = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
        losses = {
            "mse_loss": mse_loss,
            **self.calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out),
        }
        return self._step_output(step_input, sae_out, feature_acts, hidden_pre, losses)

    def sparse_step_applies(self) -> bool:
        """Whether the present configuration can take the step on the non-zeros; it then does once the code is sparse."""
        if self.cfg.sparse_step == "off" or (self.cfg.sparse_step == "auto" and self.W_enc.device.type != "cpu"):
            return False
        return (
            self.dtype in (torch.float32, torch.float64)
            # these two act inside the SAE; every other normalisation is outside it
            and self.cfg.normalize_activations not in ("constant_norm_rescale", "layer_norm")
            and not torch.compiler.is_compiling()
            # a hook wants to see, or change, the dense activations
            and not any(point.fwd_hooks or point.bwd_hooks for point in self.hook_dict.values())
        )

    def _sparse_forward_pass(self, step_input: TrainStepInput, schedule: StepSchedule) -> TrainStepOutput:
        x, cfg, coefficients = step_input.sae_in, self.cfg, step_input.coefficients
        b_dec = self.b_dec if cfg.apply_b_dec_to_input else None
        code = sparse.encode(x, self.W_enc, self.b_enc, b_dec, screen=self.density_switch.screen)
        if self.training:
            self.density_switch.observe(code)
        counts = None if self.firing_rate_ema is None else code.feature_counts
        self._observe_and_refresh(code.feature_sums / len(x), counts, len(x), schedule)
        out = sparse.loss(
            x,
            code,
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec,
            l1_weights=coefficients["l1"] * self.l1_weights,
            l2_coefficient=coefficients["l2"],
            apply_b_dec_to_input=cfg.apply_b_dec_to_input,
        )
        losses = {"mse_loss": out.mse_loss, "l1_loss": out.l1_loss, "l2_loss": out.l2_loss}
        feature_acts = code.feature_acts()
        # of the pre-activations only the positive ones are known here, and they are the activations
        return self._step_output(step_input, out.sae_out, feature_acts, feature_acts, losses)

    def _observe_and_refresh(
        self, mean_feature_acts: Tensor, n_firings: Tensor | None, batch: int, schedule: StepSchedule
    ) -> None:
        if not self.training:
            return
        mean, rates = mean_feature_acts.to(self.feature_acts_ema.dtype), None
        if n_firings is None:
            mean = schedule.reduce_mean(mean)
        else:  # one collective for both
            mean, rates = schedule.reduce_mean(torch.stack((mean, n_firings.to(mean.dtype) / batch)))
        self.observe(mean, rates, n_micro_batches=schedule.n_micro_batches)
        if schedule.refresh_weights:
            self.refresh_weights()

    def _step_output(
        self,
        step_input: TrainStepInput,
        sae_out: Tensor,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        losses: dict[str, Tensor],
    ) -> TrainStepOutput:
        metrics: dict[str, Callable[[], Tensor]] = {
            "l1_weight_mean": lambda: self.l1_weights.mean(),
            "l1_weight_pinned_max": lambda: (self.l1_weights >= self.cfg.weight_max).float().mean(),
            "l1_weight_pinned_min": lambda: (self.l1_weights <= self.cfg.weight_min).float().mean(),
            "adaptive_ramp": lambda: self.ramp.clone(),
        }
        if (rates := self.firing_rate_ema) is not None:
            metrics["guarded_share"] = lambda: (self._guard(rates) < 1).float().mean()
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=losses["mse_loss"] + losses["l1_loss"] + losses["l2_loss"],
            losses=losses,
            metrics=metrics,
        )

    def scheduled_ramp(self, n_steps: int) -> float:
        """The ramp that the config asks for at training step ``n_steps``, the first being 1."""
        return warmup_ramp(n_steps, delay_steps=self.cfg.warmup_delay_steps, ramp_steps=self.cfg.warmup_ramp_steps)

    def adaptive_state(self) -> dict[str, Tensor]:
        """Copies of the running means, the L1 weights, the ramp and the number of observed steps, contiguous."""
        state = {name: self._buffers[name] for name in _STATE_BUFFERS if name != "decoder_norm"}
        return {name: value.detach().cpu().clone() for name, value in state.items() if value is not None}

    # --- saving, loading, folding ---------------------------------------------------------------------------------

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        state_dict["W_dec"] = self._normalized(state_dict["W_dec"]).contiguous()
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()  # while training it may lie feature by feature

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        for name in _STATE_BUFFERS:
            state_dict.pop(name, None)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        # SAELens's loader casts every tensor to the SAE's dtype, the counter and the statistics too.
        for name in _FLOAT_STATE_BUFFERS:
            if name in state_dict:
                state_dict[name] = state_dict[name].to(_state_dtype(self.dtype))
        if "n_observed_steps" in state_dict:
            state_dict["n_observed_steps"] = state_dict["n_observed_steps"].to(torch.int64)

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        self.normalize_decoder()
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self.decoder_norm.div_(scaling_factor)

    @override
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        self.normalize_decoder()
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)
        self.decoder_norm.copy_(self.get_W_dec_norm())

    @override
    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Tensor:
        norms = super().fold_and_get_W_dec_norm()
        self.feature_acts_ema.mul_(norms)  # the activations just grew by the same factor
        self.decoder_norm.fill_(1.0)
        return norms

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AENTrainingSAE:
        # Module.to(bfloat16) casts floating-point buffers as well; statistics must keep their precision.
        before = {name: self._buffers[name] for name in _FLOAT_STATE_BUFFERS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in (torch.bfloat16, torch.float16):
                source = new if old.is_meta else old
                self._buffers[name] = source.to(device=new.device, dtype=_state_dtype(new.dtype))
        return self

    @override
    def log_histograms(self) -> dict[str, NDArray[np.generic]]:
        """Arrays for SAELens's histogram log: decoder norms, encoder biases, L1 weights."""
        return {
            **super().log_histograms(),
            "weights/b_e": self.b_enc.detach().float().cpu().numpy(),
            "weights/l1_weights": self.l1_weights.detach().float().cpu().numpy(),
        }


def register() -> None:
    """Register ``aen`` with SAELens; a second call, or a reload of this module, does no harm."""
    _register(SAE_CLASS_REGISTRY, register_sae_class, AENSAE, AENSAEConfig)
    _register(SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class, AENTrainingSAE, AENTrainingSAEConfig)


def _register(
    registry: dict[str, tuple[Any, Any]],
    register_fn: Callable[..., None],
    sae_class: type[SAE[Any]],
    config_class: type[SAEConfig],
) -> None:
    known = registry.get(ARCHITECTURE)
    if known is not None and known[0].__module__ != sae_class.__module__:
        raise ValueError(
            f"SAELens already has an architecture {ARCHITECTURE!r} from {known[0].__module__}; "
            "import only one package that registers it"
        )
    # A reloaded module has new classes: the registry must hand out those.
    registry.pop(ARCHITECTURE, None)
    register_fn(ARCHITECTURE, sae_class, config_class)


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


register()
