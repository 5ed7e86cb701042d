"""Steers the L1 coefficient so that L0 ends where it was asked for."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from aen_lightning.callbacks.hard_finish import HardFinish
from aen_lightning.callbacks.modules import in_refit, prefixed, sparsity_multipliers, training_saes
from aen_lightning.saes.lengths import Length, in_steps, is_length, length_expected

# Where headroom ends, as shares of d_sae and d_in. Found by trial on two kinds of data: beyond them it costs explained variance
# (docs/experiments.md, 13 and 14).
_MOST_OF_FEATURES, _MOST_OF_DIMENSIONS = 1 / 32, 1 / 6
_MOST_AT_START = 1 / 20  # of d_sae; by trial, too (docs/experiments.md, 15)
_CORRECTION_LIMIT = 1.0  # of log(L0 / target), so that one batch far off does not throw the coefficient far


class TargetL0(pl.Callback):
    """Holds L0 at a target: no coefficient to tune, for architectures with an L1 term (``aen``, ``standard``,
    ``gated``).

    The L1 coefficient is multiplied by ``exp(i + p)``: p follows the distance ``log(L0 / goal)``, i sums it
    up. The goal falls from the L0 of the first steps to the target along a geometric path and stays there.
    Everything is computed on the device; nothing waits for it. The multipliers are part of the module, so a
    checkpoint has them, and ``details/sparsity_multiplier`` logs them; at the end of a fit the coefficient
    that was reached is written to the SAE's metadata as ``reached_l1_coefficient``. SAELens's JumpReLU is
    refused: its thresholds hardly come down again, so that L0 does not follow its coefficient within a run.

    Args:
        l0: The target: mean active features per token (a count), ``> 0``.
        reach_at: Optimizer step, or share of the run, after which the goal is the target. 0.3 leaves most of the run at
            the target.
        gain: Change of ``i`` per optimizer step for an L0 that is off by a factor of e.
        damping: ``p`` for an L0 that is off by a factor of e.
        average_steps: L0 is averaged over about this many steps.
        headroom: L0 is held at this multiple of ``l0``, ``>= 1``, so that a hard phase (``HardFinish``) has more features to choose
            from when it brings L0 to ``l0``; a multiple that would let more than ``d_sae / 32`` or ``d_in / 6`` features fire is
            lowered to that, or to 1.

    Raises:
        ValueError: For a value out of range; at ``setup``, for an SAE without an L1 coefficient, or with one
            of 0, and for headroom without a ``HardFinish``.
    """

    def __init__(
        self,
        l0: float,
        reach_at: Length = 0.3,
        gain: float = 0.04,
        damping: float = 0.5,
        average_steps: int = 10,
        headroom: float = 1.0,
    ) -> None:
        for name, value, ok, expected in (
            ("l0", l0, l0 > 0, "above 0"),
            ("reach_at", reach_at, is_length(reach_at, at_least=1), length_expected(at_least=1)),
            ("gain", gain, gain > 0, "above 0"),
            ("damping", damping, damping >= 0, "at least 0"),
            ("average_steps", average_steps, average_steps >= 1, "at least 1"),
            ("headroom", headroom, 1 <= headroom < math.inf, "a finite number >= 1"),
        ):
            if not ok:
                raise ValueError(f"TargetL0.{name} must be {expected}, got {value}")
        self.l0, self.reach_at, self.gain, self.damping = l0, reach_at, gain, damping
        self.average_steps, self.headroom = average_steps, headroom
        self._states: dict[str, dict[str, Tensor]] = {}
        self._coefficients: dict[str, float] = {}
        self._held: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse SAEs that have nothing to steer before any work."""
        if stage != "fit":
            return
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        if self.headroom > 1 and not any(isinstance(callback, HardFinish) for callback in callbacks):
            raise ValueError(
                f"TargetL0.headroom is {self.headroom}, but nothing brings L0 to {self.l0} in the end: "
                "add HardFinish, or set headroom to 1"
            )
        for name, sae in training_saes(pl_module, self).items():
            coefficient = _l1_coefficient(sae)
            who = (
                f"{name!r} ({sae.cfg.architecture()})" if name else f"architecture {sae.cfg.architecture()!r}"
            )
            if coefficient is None:
                raise ValueError(
                    f"TargetL0 steers an L1 coefficient, which {who} does not have: remove the callback"
                )
            if not coefficient > 0:
                raise ValueError(
                    f"TargetL0 multiplies the coefficient of {who}, which is 0: give it a positive value"
                )
            self._coefficients[name] = coefficient
            if sae.cfg.d_sae < self.l0:
                raise ValueError(f"TargetL0.l0 is {self.l0}, but {who} has d_sae={sae.cfg.d_sae} features")
            self._held[name] = self.held_l0(sae.cfg.d_in, sae.cfg.d_sae)

    def held_l0(self, d_in: int, d_sae: int) -> float:
        """The L0 that an SAE of so many dimensions and features is held at: ``l0`` with its headroom."""
        most = min(d_sae * _MOST_OF_FEATURES, d_in * _MOST_OF_DIMENSIONS)
        return max(self.l0, min(self.headroom * self.l0, most))

    def start_l0(self, d_in: int, d_sae: int) -> float:
        """The L0 that ``InitializeFromData(l0="target")`` starts from.

        Where headroom is lowered, the start is raised: the geometric mean of the two stays ``headroom * l0``, as long as no more
        than ``d_sae / 20`` features fire. At least twice ``l0``.
        """
        mean = self.headroom * self.l0
        return max(2 * self.l0, min(mean**2 / self.held_l0(d_in, d_sae), d_sae * _MOST_AT_START))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Know the end of the run, which the path to the target needs."""
        self._reach_step = in_steps(self.reach_at, trainer.estimated_stepping_batches, "TargetL0.reach_at")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, and set the multiplier of the next step."""
        if in_refit(pl_module):  # L0 stays what it is
            return
        multipliers = sparsity_multipliers(pl_module, self)
        for name, n_firings in outputs["n_firings"].items():
            l0 = (n_firings.sum() / outputs["n_tokens"]).float().clamp_min(1e-3)
            state = self._states.get(name)
            if state is None:
                zero = torch.zeros_like(l0)
                state = self._states[name] = {"start": l0.clone(), "average": l0.clone(), "integral": zero}
            state = self._states[name] = {key: value.to(l0.device) for key, value in state.items()}
            state["average"].lerp_(l0, 1 / self.average_steps)
            done = min(1.0, trainer.global_step / self._reach_step)
            # a start below the target is no reason to climb: L0 first rises and then falls in every run
            held = self._held[name]
            goal = state["start"].clamp_min(held).pow(1 - done) * held**done
            distance = (state["average"] / goal).log().clamp(-_CORRECTION_LIMIT, _CORRECTION_LIMIT)
            state["integral"].add_(distance, alpha=self.gain / trainer.accumulate_grad_batches)
            multipliers[name].copy_((state["integral"] + self.damping * distance).exp())
            if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # set by a connector
                pl_module.log(prefixed(name, "details/sparsity_multiplier"), multipliers[name])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the coefficients that were reached."""
        for name, sae in training_saes(pl_module, self).items():
            multiplier = float(sparsity_multipliers(pl_module, self)[name])
            sae.cfg.metadata["reached_l1_coefficient"] = self._coefficients[name] * multiplier
            sae.cfg.metadata["target_l0"] = self.l0

    def state_dict(self) -> dict[str, Any]:
        """The averages and integrals."""
        return {"states": {name: dict(state) for name, state in self._states.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._states = {name: dict(state) for name, state in state_dict["states"].items()}


def _l1_coefficient(sae: Any) -> float | None:
    found = sae.get_coefficients().get("l1")
    return None if found is None else float(getattr(found, "value", found))
