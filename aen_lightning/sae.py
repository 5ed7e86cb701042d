"""AEN-SAE as a SAELens architecture: configs, the inference class and the training class (arXiv:2605.05341).

At inference an AEN-SAE *is* a ReLU SAE, so it is exported as ``standard`` unless asked otherwise and then loads
without this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens import (
    SAE,
    StandardSAE,
    StandardSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEConfig, TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from aen_lightning.penalty import (
    adaptive_weights,
    coefficients_from_paper,
    elastic_net_terms,
    warmup_ramp,
)

ARCHITECTURE = "aen"

# Training state that no inference architecture knows: dropped when a dictionary is exported.
_STATE_BUFFERS = ("feature_acts_ema", "l1_weights", "ramp", "decoder_norm", "n_observed_steps")
# Of these, the ones that must keep at least float32 when the SAE itself is cast to half precision.
_FLOAT_STATE_BUFFERS = _STATE_BUFFERS[:-1]


@dataclass
class AENSAEConfig(StandardSAEConfig):
    """Config of an AEN-SAE at inference: a ReLU SAE under its own name."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


class AENSAE(StandardSAE):
    """AEN-SAE at inference: ``relu((x - b_dec) @ W_enc + b_enc)``, then ``h @ W_dec + b_dec``."""


@dataclass(kw_only=True)
class AENTrainingSAEConfig(TrainingSAEConfig):
    """Config for training an AEN-SAE; the defaults are those published for Pythia-70M (``d_in`` 512).

    Coefficients are in SAELens's form, where the squared error is summed over ``d_in``;
    :meth:`from_paper` converts the paper's lambdas. ``gamma=0`` is the plain elastic net, ``l2_coefficient=0`` the
    adaptive lasso, both the standard L1 SAE with a unit-norm decoder.

    Args:
        l1_coefficient: Weight of ``mean_b sum_j u_j h_bj``, ``>= 0``. ``d_in`` times the paper's lambda_1.
        l2_coefficient: Weight of ``mean_b sum_j h_bj^2``, ``>= 0``. ``d_in`` times the paper's lambda_2.
        gamma: Exponent of the adaptive weights, ``>= 0``, dimensionless.
        ema_decay: Decay of the running mean per training step, in [0, 1); half-life about ``ln 2 / (1 - ema_decay)`` steps.
        weight_min: Lower bound of the adaptive weights, in (0, 1].
        weight_max: Upper bound of the adaptive weights, ``>= 1``; what a silent feature gets.
        reference_fraction: Share of the strongest features, in (0, 1], whose mean is the reference level.
        warmup_delay_steps: Training steps with all weights 1; zero or less: adaptive weights from the first step.
        warmup_ramp_steps: Training steps over which the adaptive weights are let in after the delay, ``>= 0``.
        l1_warmup_steps: Training steps over which the whole L1 term rises from 0, ``>= 0``; the paper has none.
        decoder_init_norm: None: the published start (torch's default ``nn.Linear`` initialisation for encoder and decoder).
            A positive number: SAELens's tied start, ``W_enc = decoder_init_norm * unit(W_dec)^T``. Decoder rows have
            unit norm either way.
        inference_architecture: What an exported dictionary calls itself: ``standard`` loads anywhere, ``aen`` needs this package.

    Raises:
        ValueError: On construction, for any value outside its range; the message names it.
    """

    l1_coefficient: float = 0.512
    l2_coefficient: float = 0.256
    gamma: float = 0.5
    ema_decay: float = 0.9999
    weight_min: float = 0.01
    weight_max: float = 10.0
    reference_fraction: float = 0.05
    warmup_delay_steps: int = 4000
    warmup_ramp_steps: int = 2000
    l1_warmup_steps: int = 0
    decoder_init_norm: float | None = None
    inference_architecture: Literal["standard", "aen"] = "standard"

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, ok, expected in self._constraints():
            if not ok:
                raise ValueError(f"{type(self).__name__}.{name} must be {expected}, got {getattr(self, name)!r}")

    def _constraints(self) -> list[tuple[str, bool, str]]:
        def at_least(value: Any, bound: float) -> bool:
            return _is_number(value) and math.isfinite(value) and value >= bound

        def steps(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        norm = self.decoder_init_norm
        return [
            ("d_in", steps(self.d_in) and self.d_in > 0, "a positive integer"),
            ("d_sae", steps(self.d_sae) and self.d_sae > 0, "a positive integer"),
            ("l1_coefficient", at_least(self.l1_coefficient, 0), "a finite number >= 0"),
            ("l2_coefficient", at_least(self.l2_coefficient, 0), "a finite number >= 0"),
            ("gamma", at_least(self.gamma, 0), "a finite number >= 0"),
            ("ema_decay", at_least(self.ema_decay, 0) and self.ema_decay < 1, "in [0, 1)"),
            ("weight_min", at_least(self.weight_min, 0) and 0 < self.weight_min <= 1, "in (0, 1]"),
            ("weight_max", at_least(self.weight_max, 1), "a finite number >= 1"),
            (
                "reference_fraction",
                at_least(self.reference_fraction, 0) and 0 < self.reference_fraction <= 1,
                "in (0, 1]",
            ),
            ("warmup_delay_steps", steps(self.warmup_delay_steps), "an integer number of steps"),
            ("warmup_ramp_steps", steps(self.warmup_ramp_steps) and self.warmup_ramp_steps >= 0, "an integer >= 0"),
            ("l1_warmup_steps", steps(self.l1_warmup_steps) and self.l1_warmup_steps >= 0, "an integer >= 0"),
            ("decoder_init_norm", norm is None or (at_least(norm, 0) and norm > 0), "None or a number > 0"),
            ("inference_architecture", self.inference_architecture in ("standard", "aen"), "'standard' or 'aen'"),
        ]

    @classmethod
    def from_paper(
        cls, *, d_in: int, d_sae: int, lambda_1: float, lambda_2: float, **rest: Any
    ) -> AENTrainingSAEConfig:
        """A config from the paper's lambdas, whose squared error is a mean over ``d_in``.

        Args:
            d_in: Width of the activations.
            d_sae: Number of features.
            lambda_1: The paper's L1 coefficient.
            lambda_2: The paper's L2 coefficient.
            **rest: Any other field.

        Raises:
            TypeError: If ``rest`` holds a coefficient in SAELens's form too.
        """
        for name in ("l1_coefficient", "l2_coefficient"):
            if name in rest:
                raise TypeError(f"from_paper sets {name} from the lambdas; got {name}={rest[name]!r} as well: drop one")
        l1, l2 = coefficients_from_paper(d_in=d_in, lambda_1=lambda_1, lambda_2=lambda_2)
        return cls(d_in=d_in, d_sae=d_sae, l1_coefficient=l1, l2_coefficient=l2, **rest)

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return AENSAEConfig if self.inference_architecture == "aen" else StandardSAEConfig


class AENTrainingSAE(TrainingSAE[AENTrainingSAEConfig]):
    """Trains an AEN-SAE; owns the adaptive state and the operations on it.

    State (buffers of at least float32, saved with the training SAE, dropped on export):
        feature_acts_ema: ``m``, shape (d_sae,), running mean of each feature's activation; starts at 1.
        l1_weights: ``u``, shape (d_sae,), the weights that enter the loss; start at 1.
        ramp: Scalar in [0, 1], how far the adaptive weights are let in.
        decoder_norm: Shape (d_sae,), the L2 norm that each decoder row is held to; 1 until a scaling is folded in.
        n_observed_steps: Scalar int64, training steps observed.

    Under SAELens's trainer, which has no hooks, :meth:`training_forward_pass` schedules all of it from the config. Something
    that has hooks (Lightning callbacks) sets ``scheduled_externally`` and calls :meth:`set_ramp`,
    :meth:`normalize_decoder` and ``refresh_due`` itself. Evaluation never changes state.
    """

    b_enc: nn.Parameter
    feature_acts_ema: Tensor
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
        self.register_buffer("l1_weights", ones(cfg.d_sae))
        self.register_buffer("ramp", ones())
        self.register_buffer("decoder_norm", ones(cfg.d_sae))
        self.register_buffer("n_observed_steps", torch.zeros((), dtype=torch.int64, device=self.device))
        self.scheduled_externally = False
        self.refresh_due = True
        self.micro_batches_per_step = 1
        self.reduce_mean: Callable[[Tensor], Tensor] = _identity

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
    def observe(self, mean_feature_acts: Tensor) -> None:
        """Move the running mean towards this batch: ``m <- beta m + (1 - beta) mean_b |h_b|``.

        With ``micro_batches_per_step`` n > 1 (gradient accumulation) each of the n calls moves it by ``beta^(1/n)``, so that the
        half-life stays in training steps.

        Args:
            mean_feature_acts: Mean activation of each feature over the batch, shape (d_sae,); reduced over ranks here.
        """
        decay = self.cfg.ema_decay ** (1 / self.micro_batches_per_step)
        mean = self.reduce_mean(mean_feature_acts.detach().to(self.feature_acts_ema.dtype))
        self.feature_acts_ema.mul_(decay).add_(mean, alpha=1 - decay)
        self.n_observed_steps.add_(1)

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Recompute the weights that enter the loss: ``u = 1 + (w - 1) * ramp``."""
        weights = adaptive_weights(
            self.feature_acts_ema,
            gamma=self.cfg.gamma,
            reference_fraction=self.cfg.reference_fraction,
            weight_min=self.cfg.weight_min,
            weight_max=self.cfg.weight_max,
        )
        self.l1_weights.copy_(1 + (weights - 1) * self.ramp)

    @torch.no_grad()
    def set_ramp(self, ramp: float) -> None:
        """Let the adaptive weights in by ``ramp``, a number in [0, 1], from the next refresh on."""
        if not 0 <= ramp <= 1:
            raise ValueError(f"ramp must be in [0, 1], got {ramp}")
        self.ramp.fill_(ramp)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Project the decoder rows back to their norm (1 until a scaling is folded in)."""
        self.W_dec.copy_(self._normalized(self.W_dec))

    def _normalized(self, W_dec: Tensor) -> Tensor:
        exact = W_dec.detach().to(self.decoder_norm.dtype)
        scale = self.decoder_norm.unsqueeze(1) / exact.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        # a row that is right to rounding stays as it is, so that projecting twice, as an export does, changes nothing
        right = (scale - 1).abs() <= 8 * torch.finfo(exact.dtype).eps
        return (exact * scale.masked_fill(right, 1.0)).to(W_dec.dtype)

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
        """One training step's forward: encode, observe, refresh the weights, then the loss (paper, sections 2 and 3).

        Args:
            step_input: ``sae_in`` of shape (batch, d_in); ``n_training_steps`` counts the steps finished before this one.
        """
        if not self.scheduled_externally:
            self.normalize_decoder()
            self.refresh_due = True
            self.set_ramp(self.scheduled_ramp(step_input.n_training_steps + 1))
        feature_acts, hidden_pre = self.encode_with_hidden_pre(step_input.sae_in)
        sae_out = self.decode(feature_acts)
        # h >= 0, so |h| is h; the mean is taken in at least float32 since a bf16 mean over a batch loses rare features.
        self.observe(feature_acts.detach().mean(dim=0, dtype=self.feature_acts_ema.dtype))
        if self.refresh_due:
            self.refresh_weights()
        mse_loss = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
        aux_losses = self.calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=mse_loss + aux_losses["l1_loss"] + aux_losses["l2_loss"],
            losses={"mse_loss": mse_loss, **aux_losses},
            metrics={
                "l1_weight_mean": lambda: self.l1_weights.mean(),
                "l1_weight_pinned_max": lambda: (self.l1_weights >= self.cfg.weight_max).float().mean(),
                "l1_weight_pinned_min": lambda: (self.l1_weights <= self.cfg.weight_min).float().mean(),
                "adaptive_ramp": lambda: self.ramp.clone(),
            },
        )

    def scheduled_ramp(self, n_steps: int) -> float:
        """The ramp that the config asks for at training step ``n_steps``, the first being 1."""
        return warmup_ramp(n_steps, delay_steps=self.cfg.warmup_delay_steps, ramp_steps=self.cfg.warmup_ramp_steps)

    # --- saving, loading, folding ---------------------------------------------------------------------------------

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        state_dict["W_dec"] = self._normalized(state_dict["W_dec"]).contiguous()

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        for name in _STATE_BUFFERS:
            state_dict.pop(name)

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


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
