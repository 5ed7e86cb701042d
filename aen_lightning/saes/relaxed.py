"""The relaxed refit of a dictionary: its support kept, its shrinkage undone, exported as a SAELens JumpReLU
SAE.

An L1 penalty chooses which features are active, and shrinks those it chose. The relaxed lasso (Meinshausen,
2007) keeps the choice and fits the magnitudes again without a penalty. For a dictionary, with ``z`` its
pre-activations and ``theta`` its thresholds (0 for a ReLU)::

    h = (z + offset) * 1[z > theta],   offset >= -theta,      x_hat = h @ W_dec + b_dec

with the encoder fixed and ``offset``, ``W_dec`` and ``b_dec`` trained on the squared error alone. Rows of
``W_dec`` are free, so every feature's magnitude is refitted affinely, and L0 and the dead features stay what
they were.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE, JumpReLUSAEConfig, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

ARCHITECTURE = "relaxed"
REFITTED = ("standard", "aen", "jumprelu")
"""Inference architectures whose features fire above a threshold on affine pre-activations."""


@dataclass
class RelaxedTrainingSAEConfig(TrainingSAEConfig):
    """Config of a refit.

    Made by :meth:`RelaxedTrainingSAE.of`; not registered with SAELens, as it means nothing without the
    dictionary's weights.
    """

    decoder_init_norm: float | None = None
    apply_b_dec_to_input: bool = False

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig


class RelaxedTrainingSAE(TrainingSAE[RelaxedTrainingSAEConfig]):
    """Refits a dictionary's decoder and magnitudes on its own support.

    It trains ``offset`` (d_sae,), ``W_dec`` (d_sae, d_in) and ``b_dec`` (d_in,). Fixed are ``W_enc`` (d_in,
    d_sae), ``b_enc`` (d_sae,) and the buffer ``threshold`` (d_sae,), in activation units.
    """

    b_enc: nn.Parameter
    offset: nn.Parameter
    threshold: Tensor

    @classmethod
    def of(cls, sae: SAE[Any]) -> RelaxedTrainingSAE:
        """The refit of a dictionary; reconstructions are the same until the first step.

        Where the dictionary scales each token itself (``constant_norm_rescale``), this one takes activations
        so scaled.

        Raises:
            ValueError: If its support is not a threshold on affine pre-activations.
        """
        if sae.cfg.architecture() not in REFITTED:
            raise ValueError(
                "a refit needs a dictionary whose features fire above a threshold (standard, aen or "
                "jumprelu), got "
                f"{sae.cfg.architecture()!r}"
            )
        normalize: Any = sae.cfg.normalize_activations
        relaxed = cls(
            RelaxedTrainingSAEConfig(
                d_in=sae.cfg.d_in,
                d_sae=sae.cfg.d_sae,
                dtype=sae.cfg.dtype,
                normalize_activations="none" if normalize == "constant_norm_rescale" else normalize,
                metadata=copy.deepcopy(sae.cfg.metadata),
            )
        )
        b_enc = sae.b_enc
        if sae.cfg.apply_b_dec_to_input:
            b_enc = b_enc - sae.b_dec @ sae.W_enc  # the support must not move when b_dec does
        weights = {"W_enc": sae.W_enc, "b_enc": b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        if sae.cfg.architecture() == "jumprelu":
            weights["threshold"] = sae.threshold.clamp_min(
                0
            )  # its ReLU stays at zero under a negative threshold
        with torch.no_grad():
            for name, value in weights.items():
                getattr(relaxed, name).copy_(value)
        return relaxed

    @classmethod
    def of_training(cls, sae: TrainingSAE[Any]) -> RelaxedTrainingSAE:
        """The refit of an SAE in training, as if it were exported now; activations stay as scaled as they are.

        Raises:
            ValueError: As for :meth:`of`, and for a normalisation inside the SAE.
        """
        if sae.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise ValueError(
                f"a refit is fitted in the space of its input, normalize_activations={sae.cfg.normalize_activations!r} "
                "acts inside the SAE: scale the data instead"
            )
        exported = SAE.from_dict(sae.cfg.get_inference_sae_cfg_dict())
        weights = sae.state_dict()
        sae.process_state_dict_for_saving_inference(weights)
        exported.load_state_dict(weights)
        return cls.of(exported).to(device=sae.W_enc.device)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        zeros = torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        self.b_enc = nn.Parameter(zeros, requires_grad=False)
        self.W_enc.requires_grad_(False)
        self.offset = nn.Parameter(zeros.clone())
        self.register_buffer("threshold", zeros.clone())

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # within its bound in value, but with a gradient that can lead it away from there
        offset = self.offset + (self._bounded_offset() - self.offset).detach()
        # as the exported JumpReLU computes it
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + (self.b_enc + offset))
        active = hidden_pre > (self.threshold + offset).detach()
        return self.hook_sae_acts_post(hidden_pre * active), hidden_pre

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        return {}

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens's, after the offsets are projected to where features do not fire below zero."""
        with torch.no_grad():
            self.offset.copy_(self._bounded_offset())
        return super().training_forward_pass(step_input)

    def _bounded_offset(self) -> Tensor:
        return torch.maximum(self.offset.detach(), -self.threshold)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """To the weights of a JumpReLU SAE with unit decoder rows; a row without length stays as it is."""
        super().process_state_dict_for_saving_inference(state_dict)
        del state_dict["offset"]
        offset, norm = self._bounded_offset(), self.W_dec.detach().norm(dim=-1)
        norm = torch.where(norm > 0, norm, 1)
        state_dict["W_enc"] = (state_dict["W_enc"] * norm).contiguous()
        state_dict["b_enc"] = (state_dict["b_enc"] + offset) * norm
        state_dict["threshold"] = (state_dict["threshold"] + offset) * norm
        state_dict["W_dec"] = (state_dict["W_dec"] / norm.unsqueeze(1)).contiguous()
