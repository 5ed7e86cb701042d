"""AEN-SAE with a gate: the relaxed refit, trained jointly.

An L1 penalty chooses which features are active, and shrinks those it chose. Here it acts on a gate alone, which has
a reconstruction of its own to stay honest; the activations are measured by a second head without a penalty. With
``u = (x - b_dec) @ W_enc``::

    s = relu(u + b_gate)                                       the gate, penalised as the code of `aen` is
    h = 1[u + b_gate > 0] * relu(exp(r_mag) * u + b_mag)       the activations
    L = |h W_dec + b_dec - x|^2 + |s sg(W_dec) + sg(b_dec) - x|^2 + l1 sum_j u_j s_j + l2 sum_j s_j^2

where sg stops the gradient. Every step is differentiable but for the gate's switch, which the second term trains.
At inference it is exactly a SAELens ``jumprelu`` SAE, and exported as one.

Source: Rajamanoharan et al. (2024), arXiv:2404.16014, with the penalty of arXiv:2605.05341. Not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens import GatedSAE, GatedSAEConfig, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from aen_lightning import sparse
from aen_lightning.saes.adaptive import STATE_BUFFERS
from aen_lightning.saes.aen import AENTrainingSAE
from aen_lightning.saes.aen_config import AENTrainingSAEConfig, HardFinishName
from aen_lightning.saes.penalty import elastic_net_terms
from aen_lightning.saes.registry import register_architecture
from aen_lightning.saes.step_output import CodedStepOutput
from aen_lightning.saes.step_schedule import StepSchedule

GATED_ARCHITECTURE = "aen_gated"


@dataclass
class AENGatedSAEConfig(GatedSAEConfig):
    """Config of a gated AEN-SAE at inference: a gated SAE under its own name."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return GATED_ARCHITECTURE


class AENGatedSAE(GatedSAE):
    """Reads a training folder, such as SAELens's runner leaves as a checkpoint; an export is ``jumprelu``."""

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        for name in STATE_BUFFERS:
            state_dict.pop(name, None)


@dataclass(kw_only=True)
class AENGatedTrainingSAEConfig(AENTrainingSAEConfig):
    """Config for training a gated AEN-SAE: that of ``aen``, whose penalty and statistics are the gate's.

    It has no hard phase, refuses the settings of one, and is exported as ``jumprelu``.
    """

    inference_architecture: Literal["jumprelu"] = "jumprelu"  # type: ignore[assignment]

    @override
    @classmethod
    def architecture(cls) -> str:
        return GATED_ARCHITECTURE

    @override
    def inference_architectures(self) -> tuple[str, ...]:
        return ("jumprelu",)

    @override
    def _constraints(self) -> list[tuple[str, bool, str]]:
        return [
            *super()._constraints(),
            ("hard_k", self.hard_k is None, "None, since aen_gated has no hard phase"),
            ("aux_loss_coefficient", not self.aux_loss_coefficient, "0, since aen_gated has no hard phase"),
        ]

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig


class AENGatedTrainingSAE(AENTrainingSAE):
    """Trains a gated AEN-SAE; state and schedule are those of :class:`~aen_lightning.saes.aen.AENTrainingSAE`.

    Parameters: ``W_enc`` (d_in, d_sae), ``b_gate``, ``r_mag`` and ``b_mag`` (d_sae,), ``W_dec`` (d_sae, d_in),
        ``b_dec`` (d_in,). Both heads start equal, so that it starts as the ReLU SAE that ``aen`` starts as.
    """

    has_hard_phase = False

    cfg: AENGatedTrainingSAEConfig
    b_gate: nn.Parameter
    r_mag: nn.Parameter
    b_mag: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        bias = self.b_enc.detach()
        del self.b_enc
        self.b_gate = nn.Parameter(bias.clone())
        self.r_mag = nn.Parameter(torch.zeros_like(bias))
        self.b_mag = nn.Parameter(bias.clone())

    @override
    def harden(self, k: float, finish: HardFinishName = "batchtopk") -> None:
        """Refused: its activations are not shrunk, so there is nothing for a hard phase to give back.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"architecture {GATED_ARCHITECTURE!r} has no hard phase: train 'aen' for one")

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Activations, the pre-activations of their magnitudes, and the gate, each (..., d_sae)."""
        u = self.process_sae_in(x) @ self.W_enc
        gate = torch.relu(u + self.b_gate)
        hidden_pre = self.hook_sae_acts_pre(self.r_mag.exp() * u + self.b_mag)
        return self.hook_sae_acts_post((gate > 0) * self.activation_fn(hidden_pre)), hidden_pre, gate

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature_acts, hidden_pre, _ = self._heads(x)
        return feature_acts, hidden_pre

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """The gate's losses, each with its coefficient; reads the state and never writes it."""
        return self._gate_losses(step_input, self._heads(step_input.sae_in)[2])

    def _gate_losses(self, step_input: TrainStepInput, gate: Tensor) -> dict[str, Tensor]:
        via_gate = gate @ self.W_dec.detach() + self.b_dec.detach()
        self.run_time_activation_norm_fn_in(
            step_input.sae_in
        )  # the way out forgets the norms that it has used
        via_gate = self.reshape_fn_out(self.run_time_activation_norm_fn_out(via_gate), self.d_head)
        l1, l2 = elastic_net_terms(gate, self.l1_weights, self._slopes(gate))
        return {
            "auxiliary_reconstruction_loss": (via_gate - step_input.sae_in).pow(2).sum(dim=-1).mean(),
            "l1_loss": step_input.coefficients["l1"] * l1,
            "l2_loss": self._l2_coefficient(step_input) * l2,
        }

    @override
    def _dense_forward_pass(self, step_input: TrainStepInput, schedule: StepSchedule) -> TrainStepOutput:
        feature_acts, hidden_pre, gate = self._heads(step_input.sae_in)
        sae_out = self.decode(feature_acts)
        self.observe_dense(gate, schedule)
        if self.training and self.sparse_step_applies():
            by_token = gate.detach().flatten(end_dim=-2)
            self.density_switch.observe(sparse.DenseCode(by_token))
        mse_loss = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
        losses = {"mse_loss": mse_loss, **self._gate_losses(step_input, gate)}
        fields = self._output_fields(step_input, sae_out, losses)
        return TrainStepOutput(feature_acts=feature_acts, hidden_pre=hidden_pre, **fields)

    @override
    def sparse_step_applies(self) -> bool:
        """As for ``aen``, but on a GPU only where it is asked for: the kernels there have not been tried with a gate."""
        here = self.cfg.sparse_step == "on" or self.W_enc.device.type == "cpu"
        return here and super().sparse_step_applies()

    @override
    def _own_forward_pass(self, step_input: TrainStepInput, schedule: StepSchedule) -> TrainStepOutput:
        x, cfg = step_input.sae_in, self.cfg
        if not (self.density_switch.sparse and self.sparse_step_applies()):
            return self._dense_forward_pass(step_input, schedule)
        shift = self.b_dec if cfg.apply_b_dec_to_input else None
        code = sparse.encode(x, self.W_enc, self.b_gate, shift, screen=self.density_switch.screen)
        if self.training:
            self.density_switch.observe(code)
        counts = code.feature_counts if self.counts_firings else None
        self.observe_and_refresh(code.feature_means, counts, len(x), schedule)
        out = sparse.gated_loss(
            x, code, self.W_enc, self.b_gate, self.r_mag, self.b_mag, self._trained_decoder(), self.b_dec,
            l1_weights=step_input.coefficients["l1"] * self.l1_weights,
            slopes=self._slopes(code.values),
            l2_coefficient=self._l2_coefficient(step_input),
            apply_b_dec_to_input=cfg.apply_b_dec_to_input,
        )  # fmt: skip
        losses = {
            "mse_loss": out.mse_loss,
            "auxiliary_reconstruction_loss": out.gate_mse_loss,
            "l1_loss": out.l1_loss,
            "l2_loss": out.l2_loss,
        }
        return CodedStepOutput(out.code, **self._output_fields(step_input, out.sae_out, losses))

    # --- saving, loading, folding --------------------------------------------------------------------------
    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """To the weights of a JumpReLU SAE: ``z = exp(r_mag) u + b_mag``, open where ``u > -b_gate``."""
        self.process_state_dict_for_saving(state_dict)
        scale = state_dict.pop("r_mag").exp()
        b_gate, b_mag = state_dict.pop("b_gate"), state_dict.pop("b_mag")
        state_dict["W_enc"], state_dict["b_enc"] = state_dict["W_enc"] * scale, b_mag
        folded, grown = self.folded_to_unit_rows(state_dict)
        state_dict.update(folded)
        # below zero a JumpReLU's ReLU is closed as well, so a threshold there is one at zero
        threshold = (b_mag - scale * b_gate).clamp_min(0)
        state_dict["threshold"] = (threshold.to(grown.dtype) * grown).to(b_mag.dtype)
        for name in STATE_BUFFERS:
            state_dict.pop(name, None)

    @override
    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Tensor:
        norms = super().fold_and_get_W_dec_norm()
        self.b_gate.mul_(norms)
        self.b_mag.mul_(norms)
        return norms

    @override
    @torch.no_grad()
    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)
        if not self.cfg.apply_b_dec_to_input:
            shift = mean.to(self.W_enc) @ self.W_enc
            self.b_gate.sub_(shift)
            self.b_mag.sub_(shift * self.r_mag.exp())

    @override
    def log_histograms(self) -> dict[str, NDArray[np.generic]]:
        """Arrays for SAELens's histogram log: decoder norms, the three of the heads, L1 weights."""
        log = super(AENTrainingSAE, self).log_histograms()
        for name in ("b_gate", "b_mag", "r_mag", "l1_weights"):
            log[f"weights/{name}"] = getattr(self, name).detach().float().cpu().numpy()
        return log


register_architecture(AENGatedSAE, AENGatedSAEConfig, AENGatedTrainingSAE, AENGatedTrainingSAEConfig)
