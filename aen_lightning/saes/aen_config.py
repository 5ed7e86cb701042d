"""Configs of the SAELens architecture ``aen``."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sae_lens import (
    JumpReLUSAEConfig,
    LanguageModelSAERunnerConfig,
    StandardSAEConfig,
    TopKSAEConfig,
    TrainingSAEConfig,
)
from sae_lens.saes.sae import SAEConfig
from typing_extensions import override

from aen_lightning.saes.lengths import Length, is_length, length_expected
from aen_lightning.saes.penalty import PenaltyName, coefficients_from_paper
from aen_lightning.spelling import suggest

ARCHITECTURE = "aen"
HardFinishName = Literal["batchtopk", "topk", "jumprelu"]


@dataclass
class AENSAEConfig(StandardSAEConfig):
    """Config of an AEN-SAE at inference: a ReLU SAE under its own name."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


@dataclass(kw_only=True)
class AENTrainingSAEConfig(TrainingSAEConfig):
    """Config for training an AEN-SAE; the defaults are those published for Pythia-70M (``d_in`` 512).

    Coefficients are in SAELens's form, where the squared error is summed over ``d_in``;
    :meth:`from_paper` converts the paper's lambdas. ``gamma=0`` is the plain elastic net,
    ``l2_coefficient=0`` the adaptive lasso, both the standard L1 SAE with a unit-norm decoder.

    Args:
        l1_coefficient: Weight of ``mean_b sum_j u_j h_bj``, ``>= 0``. ``d_in`` times the paper's lambda_1.
        l2_coefficient: Weight of ``mean_b sum_j h_bj^2``, ``>= 0``. ``d_in`` times the paper's lambda_2.
        gamma: Exponent of the adaptive weights, ``>= 0``, dimensionless.
        ema_decay: Decay of the running mean per training step, in [0, 1); half-life about ``ln 2 / (1 -
            ema_decay)`` steps.
        weight_min: Lower bound of the adaptive weights, in (0, 1].
        weight_max: Upper bound of the adaptive weights, ``>= 1``; what a silent feature gets.
        reference_fraction: Share of the strongest features, in (0, 1], whose mean is the reference level.
        warmup_delay_steps: Training steps with all weights 1, or a share of the run, like all lengths here; zero or less: adaptive weights from the first
            step.
        warmup_ramp_steps: Training steps over which the adaptive weights are let in after the delay, ``>=
            0``.
        l1_warmup_steps: Training steps over which the whole L1 term rises from 0, ``>= 0``; the paper has
            none.
        starvation_guard: Share of the mean firing rate, ``>= 0``, under which a feature pays less
            (:func:`~aen_lightning.saes.penalty.starvation_guard`); 0.1 is a good value. 0: off, as in the
            paper. It acts from the first step on, whatever the delay, and multiplies the adaptive weights:
            ``gamma=0`` leaves it alone.
        penalty: How an activation is penalised: ``l1`` (the paper); ``mcp``, ``scad`` or ``log``, whose
            slopes fall with the activation, so that strong ones shrink less
            (:func:`~aen_lightning.saes.penalty.penalty_slopes`). Their scale is the running mean of the
            activations that are not zero.
        penalty_shape: Shape a of a concave penalty, dimensionless, ``> 0`` (``scad``: ``> 1``); the larger,
            the closer to ``l1``.
        remove_radial_gradient: Leave out the part of the decoder's gradient along its rows, which the
            projection to unit norm would undo, but Adam's moments would keep. Off in the paper.
        guard_min: Least factor of the guard, in (0, 1]; what a silent feature gets.
        guard_decay: Decay of the running firing rates per training step, in [0, 1).
        decoder_init_norm: None: the published start (torch's default ``nn.Linear`` initialisation for encoder
            and decoder). A positive number: SAELens's tied start, ``W_enc = decoder_init_norm *
            unit(W_dec)^T``. Decoder rows have unit norm either way.
        sparse_step: Compute the training step on the non-zeros of the code, exactly
            (:mod:`aen_lightning.sparse`), once the code is sparse enough. ``auto``: on a CPU, and on a GPU on which
            the Triton kernels solve a test problem; ``on``: on any device; ``off``: always dense. Where it cannot apply (parameters in half precision, a run-time
            normalisation in the SAE, hooks on the SAE) the step is dense.
        hard_k: Mean active features per token in a hard phase (:meth:`AENTrainingSAE.harden`, callback
            ``HardFinish``); None before it.
        hard_finish: What the hard phase keeps: ``batchtopk`` the largest activations of a batch, ``topk`` the
            ``hard_k`` largest of each token, ``jumprelu`` what is above its feature's threshold, which is trained
            (:func:`~aen_lightning.saes.jump_thresholds.keep_above`).
        aux_loss_coefficient: Weight of the auxiliary loss in the hard phase, ``>= 0``, in which silent features
            reconstruct what the others leave over, as in SAELens's TopK and BatchTopK, whose value is 1. 0: none. Where many are
            silent at once and the learning rate is high, 1 makes explained variance fall again and again; 1/32 (Gao et al.,
            arXiv:2406.04093) does not.
        aux_loss_window: Training steps without firing, or a share of the run, after which a feature takes part
            in it. None: ``dead_feature_window`` of the module.
        aux_loss_k: How many silent features a token takes at most, ``>= 1``. None: ``d_in // 2``, as in SAELens.
        inference_architecture: What an exported dictionary calls itself: ``standard`` loads anywhere, ``aen``
            needs this package.

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
    warmup_delay_steps: Length = 4000
    warmup_ramp_steps: Length = 2000
    l1_warmup_steps: Length = 0
    starvation_guard: float = 0.0
    penalty: PenaltyName = "l1"
    penalty_shape: float = 2.0
    remove_radial_gradient: bool = False
    guard_min: float = 0.02
    guard_decay: float = 0.99
    decoder_init_norm: float | None = None
    sparse_step: Literal["auto", "on", "off"] = "auto"
    hard_k: float | None = None
    hard_finish: HardFinishName = "batchtopk"
    aux_loss_coefficient: float = 0.0
    aux_loss_window: Length | None = None
    aux_loss_k: int | None = None
    inference_architecture: Literal["standard", "aen"] = "standard"

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aux_loss_coefficient and self.normalize_activations in (
            "constant_norm_rescale",
            "layer_norm",
        ):
            raise ValueError(
                "the auxiliary loss is in the space of the input, "
                f"normalize_activations={self.normalize_activations!r} acts inside the SAE: set "
                "aux_loss_coefficient to 0, or scale the data instead"
            )
        for name, ok, expected in self._constraints():
            if not ok:
                raise ValueError(
                    f"{type(self).__name__}.{name} must be {expected}, got {getattr(self, name)!r}"
                )

    def _constraints(self) -> list[tuple[str, bool, str]]:
        def at_least(value: Any, bound: float) -> bool:
            return _is_number(value) and math.isfinite(value) and value >= bound

        def count(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value > 0

        norm = self.decoder_init_norm
        return [
            ("d_in", count(self.d_in), "a positive integer"),
            ("d_sae", count(self.d_sae), "a positive integer"),
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
            (
                "warmup_delay_steps",
                is_length(self.warmup_delay_steps, at_least=None),
                length_expected(at_least=None),
            ),
            ("warmup_ramp_steps", is_length(self.warmup_ramp_steps), length_expected()),
            ("l1_warmup_steps", is_length(self.l1_warmup_steps), length_expected()),
            ("starvation_guard", at_least(self.starvation_guard, 0), "a finite number >= 0"),
            ("penalty", self.penalty in get_args(PenaltyName), f"one of {', '.join(get_args(PenaltyName))}"),
            (
                "penalty_shape",
                at_least(self.penalty_shape, 0) and self.penalty_shape > (1 if self.penalty == "scad" else 0),
                "a finite number > 1 for scad, > 0 else",
            ),
            ("remove_radial_gradient", isinstance(self.remove_radial_gradient, bool), "true or false"),
            ("guard_min", at_least(self.guard_min, 0) and 0 < self.guard_min <= 1, "in (0, 1]"),
            ("guard_decay", at_least(self.guard_decay, 0) and self.guard_decay < 1, "in [0, 1)"),
            ("decoder_init_norm", norm is None or (at_least(norm, 0) and norm > 0), "None or a number > 0"),
            ("sparse_step", self.sparse_step in ("auto", "on", "off"), "'auto', 'on' or 'off'"),
            (
                "hard_finish",
                self.hard_finish in get_args(HardFinishName),
                f"one of {', '.join(get_args(HardFinishName))}",
            ),
            (
                "hard_k",
                self.hard_finish != "topk" or self.hard_k is None or self.hard_k == int(self.hard_k),
                "a whole number of features with hard_finish='topk'",
            ),
            ("aux_loss_coefficient", at_least(self.aux_loss_coefficient, 0), "a finite number >= 0"),
            (
                "aux_loss_window",
                self.aux_loss_window is None or is_length(self.aux_loss_window),
                f"None, {length_expected()}",
            ),
            ("aux_loss_k", self.aux_loss_k is None or count(self.aux_loss_k), "None or a positive integer"),
            (
                "inference_architecture",
                self.inference_architecture in self.inference_architectures(),
                " or ".join(map(repr, self.inference_architectures())),
            ),
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
                raise TypeError(
                    f"from_paper sets {name} from the lambdas; got {name}={rest[name]!r} as well: drop one"
                )
        l1, l2 = coefficients_from_paper(d_in=d_in, lambda_1=lambda_1, lambda_2=lambda_2)
        return cls(d_in=d_in, d_sae=d_sae, l1_coefficient=l1, l2_coefficient=l2, **rest)

    def inference_architectures(self) -> tuple[str, ...]:
        """What an exported dictionary may call itself."""
        return ("standard", "aen")

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Any:
        """As SAELens's, but takes its spelling ``l1_warm_up_steps``, and refuses what it would drop.

        Raises:
            ValueError: For a key that is no field, or the same one in two spellings.
        """
        given = with_our_spelling(config_dict)
        known = [field.name for field in dataclasses.fields(cls) if field.init]
        for key in given:
            if key not in {*known, "architecture", *_OF_SAELENS}:
                near = suggest(key, known) or f"; it takes {', '.join(sorted(known))}"
                raise ValueError(f"{cls.__name__} has no field {key!r}{near}")
        return super().from_dict(given)

    @property
    def k(self) -> int:
        """What SAELens's ``topk`` asks of the config that it is exported from.

        Raises:
            ValueError: Before a hard phase.
        """
        if self.hard_k is None:
            raise ValueError("there is no k before a hard phase: hard_k is None")
        return int(self.hard_k)

    @property
    def rescale_acts_by_decoder_norm(self) -> bool:
        """False: activations are compared as they are. SAELens's ``topk`` asks for it, too."""
        return False

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        if self.hard_k is not None:
            return TopKSAEConfig if self.hard_finish == "topk" else JumpReLUSAEConfig
        return AENSAEConfig if self.inference_architecture == "aen" else StandardSAEConfig


# what SAELens adds to a config that it reads: a field of old, and those of its runner
_OF_SAELENS = {
    "finetuning_scaling_factor",
    *(f.name for f in dataclasses.fields(LanguageModelSAERunnerConfig)),
}


def with_our_spelling(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with ``l1_warmup_steps`` where SAELens's architectures say ``l1_warm_up_steps``.

    Raises:
        ValueError: If both are there.
    """
    if "l1_warm_up_steps" not in fields:
        return fields
    if "l1_warmup_steps" in fields:
        raise ValueError("l1_warm_up_steps and l1_warmup_steps say the same: drop one")
    return {"l1_warmup_steps" if key == "l1_warm_up_steps" else key: value for key, value in fields.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
