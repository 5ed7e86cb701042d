"""AEN-SAE as a SAELens architecture: the inference class and the training class (arXiv:2605.05341).

At inference an AEN-SAE *is* a ReLU SAE, so it is exported as ``standard`` unless asked otherwise and then
loads without this package.
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
from aen_lightning.saes.adaptive import STATE_BUFFERS, AdaptiveState
from aen_lightning.saes.aen_config import ARCHITECTURE, AENSAEConfig, AENTrainingSAEConfig
from aen_lightning.saes.penalty import elastic_net_terms, penalty_concavity, penalty_slopes
from aen_lightning.saes.step_output import CodedStepOutput
from aen_lightning.saes.step_schedule import StepSchedule
from aen_lightning.saes.tangent import without_radial_gradient
from aen_lightning.sparse import backend

_THRESHOLD_RATE = 0.01  # SAELens's BatchTopK takes the same


class AENSAE(StandardSAE):
    """AEN-SAE at inference: ``relu((x - b_dec) @ W_enc + b_enc)``, then ``h @ W_dec + b_dec``."""

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Also takes a training folder, such as SAELens's runner leaves as a checkpoint."""
        super().process_state_dict_for_loading(state_dict)
        for name in STATE_BUFFERS:
            state_dict.pop(name, None)


class AENTrainingSAE(AdaptiveState, TrainingSAE[AENTrainingSAEConfig]):
    """Trains an AEN-SAE; owns the adaptive state (:class:`~aen_lightning.saes.adaptive.AdaptiveState`).

    Under SAELens's trainer, which has no hooks, :meth:`training_forward_pass` schedules all of it from the
    config. A driver that has hooks (our LightningModules) calls :meth:`set_ramp` and
    :meth:`normalize_decoder` itself and hands each batch to :meth:`scheduled_forward_pass` with a
    :class:`StepSchedule`. In eval mode no state changes.
    """

    b_enc: nn.Parameter

    def __init__(self, cfg: AENTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.register_adaptive_state(self.dtype, self.device)
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

    # --- training ------------------------------------------------------------------------------------------
    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {
            "l1": TrainCoefficientConfig(
                value=self.cfg.l1_coefficient,
                warm_up_steps=self.cfg.l1_warmup_steps,  # a share is resolved by who drives
            ),
            "l2": self.cfg.l2_coefficient,
        }

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sae_in = self.process_sae_in(x)
        hidden_pre = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
        feature_acts = self.activation_fn(hidden_pre)
        if (
            self.cfg.hard_k is not None
        ):  # as the exported JumpReLU SAE will; a training step keeps k a token instead
            feature_acts = feature_acts * (hidden_pre > self.hard_threshold)
        return self.hook_sae_acts_post(feature_acts), hidden_pre

    @torch.no_grad()
    def harden(self, k: float) -> None:
        """From now on keep the ``k * batch`` largest activations of each batch (BatchTopK) and drop the penalty.

        Weights and statistics stay. What is exported is a ``jumprelu`` SAE, whose threshold is the running mean of the
        least activation kept. The SAE is no longer differentiable throughout: activations below that level get no
        gradient.

        Args:
            k: Mean active features per token (a count), above 0 and at most d_sae.

        Raises:
            ValueError: For another ``k``.
        """
        if not 0 < k <= self.cfg.d_sae:
            raise ValueError(f"k must be above 0 and at most d_sae {self.cfg.d_sae}, got {k}")
        self.cfg.hard_k = k

    @torch.no_grad()
    def _observe_threshold(self, least: Tensor) -> None:
        if self.training:
            moved = self.hard_threshold.lerp(least.to(self.hard_threshold.dtype), _THRESHOLD_RATE)
            self.hard_threshold.copy_(torch.where(self.hard_threshold == 0, least.to(moved.dtype), moved))

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        sae_out = self.hook_sae_recons(feature_acts @ self._trained_decoder() + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(sae_out), self.d_head)

    def _trained_decoder(self) -> Tensor:
        return without_radial_gradient(self.W_dec) if self.cfg.remove_radial_gradient else self.W_dec

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """``l1_loss`` and ``l2_loss``, each with its coefficient; reads the state and never writes it."""
        if self.cfg.hard_k is not None:
            zero = feature_acts.new_zeros(())
            return {"l1_loss": zero, "l2_loss": zero}
        l1, l2 = elastic_net_terms(feature_acts, self.l1_weights, self._slopes(feature_acts))
        return {
            "l1_loss": step_input.coefficients["l1"] * l1,
            "l2_loss": self._l2_coefficient(step_input) * l2,
        }

    def _slopes(self, feature_acts: Tensor) -> Tensor | None:
        if self.activation_scale is None:
            return None
        return penalty_slopes(
            feature_acts, penalty=self.cfg.penalty, scale=self.activation_scale, shape=self.cfg.penalty_shape
        )

    def _l2_coefficient(self, step_input: TrainStepInput) -> float:
        return step_input.coefficients.get("l2", self.cfg.l2_coefficient)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One training step's forward under a trainer without hooks, such as SAELens's: the schedule is the
        config's.

        Args:
            step_input: ``sae_in`` of shape (..., d_in); ``n_training_steps`` counts the steps finished before
                this one.
        """
        if self.training:
            self.normalize_decoder()
            self.set_ramp(self.scheduled_ramp(step_input.n_training_steps + 1))
        return self.scheduled_forward_pass(step_input, StepSchedule())

    def scheduled_forward_pass(self, step_input: TrainStepInput, schedule: StepSchedule) -> TrainStepOutput:
        """Encode, observe, refresh the weights, then the loss (paper, sections 2 and 3); in eval mode without
        the middle two.

        Once few enough features fire, all of it is computed on the non-zeros of the code, with the same
        result to rounding; ``feature_acts`` of the output is then a coalesced COO tensor.

        Args:
            step_input: ``sae_in`` of shape (..., d_in); the step on the non-zeros takes (batch, d_in) only.
            schedule: What the driver decides.
        """
        if step_input.sae_in.ndim == 2 and self._own_step_applies():
            return self._own_forward_pass(step_input, schedule)
        feature_acts, hidden_pre = self.encode_with_hidden_pre(step_input.sae_in)
        if self.cfg.hard_k is not None:
            positive = self.activation_fn(hidden_pre)
            n_kept = int(self.cfg.hard_k * positive[..., 0].numel())
            least = positive.detach().flatten().topk(n_kept).values[-1]
            feature_acts = positive * (positive.detach() >= least)
            self._observe_threshold(least)
        sae_out = self.decode(feature_acts)
        by_token = feature_acts.detach().flatten(end_dim=-2)
        counts = by_token.count_nonzero(dim=0) if self.counts_firings else None
        # h >= 0, so |h| is h; the mean is taken in at least float32 since a bf16 mean over a batch loses rare
        # features.
        mean = by_token.mean(dim=0, dtype=self.feature_acts_ema.dtype)
        self.observe_and_refresh(mean, counts, len(by_token), schedule)
        mse_loss = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
        losses = {
            "mse_loss": mse_loss,
            **self.calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out),
        }
        fields = self._output_fields(step_input, sae_out, losses)
        return TrainStepOutput(feature_acts=feature_acts, hidden_pre=hidden_pre, **fields)

    def sparse_step_applies(self) -> bool:
        """Whether the present configuration can take the step on the non-zeros.

        It then does once the code is sparse.
        """
        if not self._own_step_applies():
            return False
        device = self.W_enc.device
        on_this_device = self.cfg.sparse_step == "on" or device.type == "cpu"
        return on_this_device or (self.dtype == torch.float32 and backend.triton_serves(device))

    def _own_step_applies(self) -> bool:
        """Whether the step can be that of :mod:`aen_lightning.sparse`, dense or on the non-zeros, and not
        autograd's.
        """
        return (
            self.cfg.sparse_step != "off"
            and self.dtype in (torch.float32, torch.float64)
            # these two act inside the SAE; every other normalisation is outside it
            and self.cfg.normalize_activations not in ("constant_norm_rescale", "layer_norm")
            and not torch.compiler.is_compiling()
            # a hook wants to see, or change, the dense activations
            and not any(point.fwd_hooks or point.bwd_hooks for point in self.hook_dict.values())
        )

    def _own_forward_pass(self, step_input: TrainStepInput, schedule: StepSchedule) -> TrainStepOutput:
        x = step_input.sae_in
        b_dec = self.b_dec if self.cfg.apply_b_dec_to_input else None
        code = self._encode_own(x, b_dec)
        counts = code.feature_counts if self.counts_firings else None
        self.observe_and_refresh(code.feature_sums / len(x), counts, len(x), schedule)
        out = self._loss_of(code, step_input)
        observed = code
        if isinstance(code, sparse.PaddedCode) and code.overflowed:
            # Its statistics were right. The device is still busy with the decoding while the host learns of this.
            code = sparse.encode_dense(x, self.W_enc, self.b_enc, b_dec)
            out = self._loss_of(code, step_input)
        if self.training and self.sparse_step_applies():
            self.density_switch.observe(observed)
        losses = {"mse_loss": out.mse_loss, "l1_loss": out.l1_loss, "l2_loss": out.l2_loss}
        return CodedStepOutput(code, **self._output_fields(step_input, out.sae_out, losses))

    def _encode_own(self, x: Tensor, b_dec: Tensor | None) -> sparse.SparseCode | sparse.DenseCode:
        encoder, hard_k = (x, self.W_enc, self.b_enc, b_dec), self.cfg.hard_k
        if hard_k is not None:
            # what exceeds half the usual level is few, and enough
            code = sparse.encode_batch_topk(
                *encoder, k=hard_k, level=0.5 * self.hard_threshold, capacity=int(4 * hard_k * len(x))
            )
            if isinstance(code, sparse.PaddedCode) and code.overflowed:
                code = sparse.encode_batch_topk(*encoder, k=hard_k)
            self._observe_threshold(code.least)
            return code
        switch = self.density_switch
        if switch.sparse and self.sparse_step_applies():
            return sparse.encode(*encoder, screen=switch.screen, capacity=switch.capacity)
        return sparse.encode_dense(*encoder)

    def _loss_of(
        self, code: sparse.SparseCode | sparse.DenseCode, step_input: TrainStepInput
    ) -> sparse.SparseLoss:
        hard = self.cfg.hard_k is not None
        return sparse.loss(
            step_input.sae_in,
            code,
            self.W_enc,
            self.b_enc,
            self._trained_decoder(),
            self.b_dec,
            l1_weights=None if hard else step_input.coefficients["l1"] * self.l1_weights,
            slopes=None if hard else self._slopes(code.values),
            l2_coefficient=0.0 if hard else self._l2_coefficient(step_input),
            apply_b_dec_to_input=self.cfg.apply_b_dec_to_input,
        )

    def _output_fields(
        self, step_input: TrainStepInput, sae_out: Tensor, losses: dict[str, Tensor]
    ) -> dict[str, Any]:
        return {
            "sae_in": step_input.sae_in,
            "sae_out": sae_out,
            "loss": losses["mse_loss"] + losses["l1_loss"] + losses["l2_loss"],
            "losses": losses,
            "metrics": {**self.adaptive_metrics(), **self._convexity_metric(step_input)},
        }

    def _convexity_metric(self, step_input: TrainStepInput) -> dict[str, Callable[[], Tensor]]:
        """``coding_convexity``.

        At least 1 where the ridge term makes coding convex for every dictionary, below 1 where it does not.
        """
        if (scale := self.activation_scale) is None:
            return {}
        l1, l2 = step_input.coefficients["l1"], self._l2_coefficient(step_input)

        def convexity() -> Tensor:
            concavity = penalty_concavity(penalty=self.cfg.penalty, scale=scale, shape=self.cfg.penalty_shape)
            return 2 * l2 / (l1 * self.l1_weights.max() * concavity)

        return {"coding_convexity": convexity}

    # --- saving, loading, folding --------------------------------------------------------------------------
    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()  # while training it may lie feature by feature

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        folded, grown = self.folded_to_unit_rows(state_dict)
        state_dict.update(folded)
        if self.cfg.hard_k is not None:
            self.cfg.inference_architecture = "jumprelu"
            state_dict["threshold"] = (self.hard_threshold * grown).to(folded["b_enc"].dtype)
        for name in STATE_BUFFERS:
            state_dict.pop(name, None)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        self.complete_state_dict(state_dict)

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self.decoder_norm.div_(scaling_factor)

    @override
    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)
        self.decoder_norm.copy_(self.get_W_dec_norm())

    @override
    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Tensor:
        if self.cfg.hard_k is not None:
            raise NotImplementedError(
                "one threshold cannot follow decoder rows of several norms: export the SAE and fold the jumprelu one"
            )
        norms = super().fold_and_get_W_dec_norm()
        self.feature_acts_ema.mul_(norms)  # the activations just grew by the same factor
        self.decoder_norm.fill_(1.0)
        return norms

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


register()
