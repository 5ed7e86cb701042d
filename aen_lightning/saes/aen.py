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
from sae_lens import StandardSAE, TrainingSAE
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from aen_lightning import sparse
from aen_lightning.saes.adaptive import STATE_BUFFERS, AdaptiveState
from aen_lightning.saes.aen_config import AENSAEConfig, AENTrainingSAEConfig
from aen_lightning.saes.hard_phase import HardPhase
from aen_lightning.saes.penalty import elastic_net_terms, penalty_concavity, penalty_slopes
from aen_lightning.saes.registry import register_architecture
from aen_lightning.saes.sparse_step import SparseStep
from aen_lightning.saes.step_output import CodedStepOutput
from aen_lightning.saes.step_schedule import StepSchedule
from aen_lightning.saes.tangent import without_radial_gradient


class AENSAE(StandardSAE):
    """AEN-SAE at inference: ``relu((x - b_dec) @ W_enc + b_enc)``, then ``h @ W_dec + b_dec``."""

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Also takes a training folder, such as SAELens's runner leaves as a checkpoint."""
        super().process_state_dict_for_loading(state_dict)
        for name in STATE_BUFFERS:
            state_dict.pop(name, None)


class AENTrainingSAE(AdaptiveState, HardPhase, SparseStep, TrainingSAE[AENTrainingSAEConfig]):
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
        self.threshold_offsets = None
        if cfg.hard_finish == "jumprelu" and self.has_hard_phase:
            self.prepare_hard_phase("jumprelu")

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
        if self.cfg.hard_k is None:
            feature_acts = self.activation_fn(hidden_pre)
        else:
            feature_acts = self.hard_feature_acts(hidden_pre)
        return self.hook_sae_acts_post(feature_acts), hidden_pre

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
            return self._hard_losses(step_input, sae_out, None)
        l1, l2 = elastic_net_terms(feature_acts, self.l1_weights, self._slopes(feature_acts))
        return {
            "l1_loss": step_input.coefficients["l1"] * l1,
            "l2_loss": self._l2_coefficient(step_input) * l2,
        }

    def _hard_losses(
        self, step_input: TrainStepInput, sae_out: Tensor, n_dead_at_most: int | None
    ) -> dict[str, Tensor]:
        zero = sae_out.new_zeros(())
        losses = {"l1_loss": zero, "l2_loss": zero}
        if self.cfg.aux_loss_coefficient:
            losses["auxiliary_reconstruction_loss"] = self.auxiliary_loss(
                step_input.sae_in,
                sae_out,
                self._trained_decoder(),
                step_input.dead_neuron_mask,
                n_dead_at_most,
            )
        return losses

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
        # to find the largest activations of a batch without the kernels is to wait for a GPU again and again
        own = self.own_step_applies() if self.cfg.hard_k is None else self.sparse_step_applies()
        if step_input.sae_in.ndim != 2 or not own:
            return self._dense_forward_pass(step_input, schedule)
        if self.cfg.hard_k is None or self.cfg.hard_finish != "jumprelu":
            return self._own_forward_pass(step_input, schedule)
        if step_input.sae_in.device.type == "cpu":  # elsewhere it would wait for the device
            return self._jump_forward_pass(step_input, schedule)
        return self._dense_forward_pass(step_input, schedule)

    def _dense_forward_pass(self, step_input: TrainStepInput, schedule: StepSchedule) -> TrainStepOutput:
        feature_acts, hidden_pre = self.encode_with_hidden_pre(step_input.sae_in)
        if self.cfg.hard_k is not None and self.cfg.hard_finish != "topk":
            feature_acts, least = self.keep_largest(hidden_pre)
            self.observe_threshold(least, schedule)
        sae_out = self.decode(feature_acts)
        self.observe_dense(feature_acts, schedule)
        losses = {"mse_loss": self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()}
        if self.cfg.hard_k is None:
            losses |= self.calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        else:
            losses |= self._hard_losses(step_input, sae_out, schedule.n_dead_at_most)
        fields = self._output_fields(step_input, sae_out, losses)
        return TrainStepOutput(feature_acts=feature_acts, hidden_pre=hidden_pre, **fields)

    def _own_forward_pass(self, step_input: TrainStepInput, schedule: StepSchedule) -> TrainStepOutput:
        x = step_input.sae_in
        b_dec = self.b_dec if self.cfg.apply_b_dec_to_input else None
        code = self._encode_own(x, b_dec, schedule)
        counts = code.feature_counts if self.counts_firings else None
        self.observe_and_refresh(code.feature_means, counts, len(x), schedule)
        out = self._loss_of(code, step_input)
        observed = code
        if isinstance(code, sparse.PaddedCode) and code.overflowed:
            # Its statistics were right. The device is still busy with the decoding while the host learns of this.
            code = sparse.encode_dense(x, self.W_enc, self.b_enc, b_dec)
            out = self._loss_of(code, step_input)
        if self.training and self.sparse_step_applies():
            self.density_switch.observe(observed)
        losses = {"mse_loss": out.mse_loss, "l1_loss": out.l1_loss, "l2_loss": out.l2_loss}
        if self.cfg.hard_k is not None:
            losses |= self._hard_losses(step_input, out.sae_out, schedule.n_dead_at_most)
        return CodedStepOutput(code, **self._output_fields(step_input, out.sae_out, losses))

    def _jump_forward_pass(self, step_input: TrainStepInput, schedule: StepSchedule) -> TrainStepOutput:
        x = step_input.sae_in
        with torch.autocast(x.device.type, enabled=False):
            wide, acts, level = self.jump_code(x)
            self.observe_threshold(level, schedule)
            code = sparse.positive_entries(wide, acts.detach())
            counts = code.feature_counts if self.counts_firings else None
            self.observe_and_refresh(code.feature_means, counts, len(x), schedule)
            sae_out = sparse.decode(acts, self._trained_decoder(), self.b_dec, wide)
            losses = {"mse_loss": self.mse_loss_fn(sae_out, x.to(sae_out.dtype)).sum(dim=-1).mean()}
        losses |= self._hard_losses(step_input, sae_out, schedule.n_dead_at_most)
        return CodedStepOutput(code, **self._output_fields(step_input, sae_out, losses))

    def _encode_own(
        self, x: Tensor, b_dec: Tensor | None, schedule: StepSchedule
    ) -> sparse.SparseCode | sparse.DenseCode:
        encoder, hard_k = (x, self.W_enc, self.b_enc, b_dec), self.cfg.hard_k
        if hard_k is not None and self.cfg.hard_finish == "topk":
            return sparse.encode_topk(*encoder, k=self.cfg.k)
        if hard_k is not None:
            # what exceeds half the usual level is few, and enough
            code = sparse.encode_batch_topk(
                *encoder, k=hard_k, level=0.5 * self.hard_threshold, capacity=int(4 * hard_k * len(x))
            )
            if isinstance(code, sparse.PaddedCode) and code.overflowed:
                code = sparse.encode_batch_topk(*encoder, k=hard_k)
            self.observe_threshold(code.least if code.values.numel() else self.hard_threshold, schedule)
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
        total = losses["mse_loss"]
        for name, value in losses.items():
            total = total if name == "mse_loss" else total + value
        if self.threshold_offsets is not None and self.cfg.hard_k is None:
            total = total + 0 * self.threshold_offsets.sum()  # DDP waits for the gradient of every parameter
        return {
            "sae_in": step_input.sae_in,
            "sae_out": sae_out,
            "loss": total,
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
        # TopK compares the activations of features, which another norm of their rows would change
        if self.cfg.hard_k is None or self.cfg.hard_finish != "topk":
            folded, grown = self.folded_to_unit_rows(state_dict)
            state_dict.update(folded)
            if self.cfg.hard_k is not None:
                state_dict["threshold"] = (self.thresholds() * grown).to(folded["b_enc"].dtype)
        for name in (*STATE_BUFFERS, "threshold_offsets"):
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
                "a hard phase compares the activations of all features, which decoder rows of several norms would change: "
                "export the SAE and fold that one"
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


register_architecture(AENSAE, AENSAEConfig, AENTrainingSAE, AENTrainingSAEConfig)
