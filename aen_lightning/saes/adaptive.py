"""The state that adapts while an AEN-SAE trains, and the operations on it.

Shared by every architecture of the family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import hardshrink

from aen_lightning.compat import FullPrecisionBuffers
from aen_lightning.saes.aen_config import AENTrainingSAEConfig
from aen_lightning.saes.lengths import in_steps
from aen_lightning.saes.penalty import adaptive_weights, starvation_guard, warmup_ramp
from aen_lightning.saes.step_schedule import StepSchedule

# what each starts at
_START = {
    "feature_acts_ema": 1,
    "firing_rate_ema": 0,
    "l1_weights": 1,
    "ramp": 1,
    "decoder_norm": 1,
    "activation_scale": 0,
    "hard_threshold": 0,
    "n_hard_steps": 0,
    "n_observed_steps": 0,
}
_PER_FEATURE = ("feature_acts_ema", "firing_rate_ema", "l1_weights", "decoder_norm")
_COUNTERS = ("n_hard_steps", "n_observed_steps")
STATE_BUFFERS = tuple(_START)
"""Training state that no inference architecture knows: dropped when a dictionary is exported."""

_SCALE_DECAY = 0.99  # of the running mean activation of the concave penalties; it follows the activations, not the features


class AdaptiveState(FullPrecisionBuffers):
    """Mixin for a SAELens training SAE that adapts its L1 weights and holds its decoder rows to a norm.

    State (buffers of at least float32, saved with the training SAE, dropped on export):
        feature_acts_ema: ``m``, shape (d_sae,), running mean of each feature's activation; starts at 1.
        firing_rate_ema: Shape (d_sae,), running firing rates, up to a common factor, as they start at 0; only
            with a starvation guard.
        l1_weights: ``u``, shape (d_sae,), the weights that enter the loss; start at 1.
        ramp: Scalar in [0, 1], how far the adaptive weights are let in.
        decoder_norm: Shape (d_sae,), the L2 norm that each decoder row is held to; 1 until a scaling is
            folded in.
        activation_scale: Scalar ``tau``, running mean of the activations that are not zero; only with a
            concave penalty.
        hard_threshold: Scalar, running least activation kept in a hard phase; 0 before it.
        n_hard_steps: Scalar int64, steps of the hard phase observed.
        n_observed_steps: Scalar int64, training steps observed.
    """

    full_precision_buffers = tuple(name for name in STATE_BUFFERS if name not in _COUNTERS)

    cfg: AENTrainingSAEConfig
    training: bool
    register_buffer: Callable[[str, Tensor | None], None]
    W_dec: nn.Parameter
    feature_acts_ema: Tensor
    firing_rate_ema: Tensor | None
    l1_weights: Tensor
    ramp: Tensor
    decoder_norm: Tensor
    activation_scale: Tensor | None
    hard_threshold: Tensor
    n_hard_steps: Tensor
    n_observed_steps: Tensor

    def register_adaptive_state(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make the buffers, for an SAE whose weights have this dtype and device."""
        absent = set()
        if not self.cfg.starvation_guard:
            absent.add("firing_rate_ema")
        if self.cfg.penalty == "l1":
            absent.add("activation_scale")
        for name, start in _START.items():
            shape = (self.cfg.d_sae,) if name in _PER_FEATURE else ()
            kind = torch.int64 if name in _COUNTERS else _state_dtype(dtype)
            buffer = None if name in absent else torch.full(shape, start, dtype=kind, device=device)
            self.register_buffer(name, buffer)

    @torch.no_grad()
    def observe(
        self, mean_feature_acts: Tensor, firing_rates: Tensor | None = None, *, n_micro_batches: int = 1
    ) -> None:
        """Move the running means towards this batch: ``m <- beta m + (1 - beta) mean_b |h_b|``, the others
        likewise.

        Args:
            mean_feature_acts: Mean activation of each feature over the batch of all ranks, shape (d_sae,).
            firing_rates: Share of that batch on which each feature fired, likewise; needed with a starvation
                guard or a concave penalty only.
            n_micro_batches: See :class:`StepSchedule`.
        """
        mean = mean_feature_acts.to(self.feature_acts_ema.dtype)
        if self.firing_rate_ema is not None:
            assert firing_rates is not None
            self.firing_rate_ema.lerp_(firing_rates, 1 - self.cfg.guard_decay ** (1 / n_micro_batches))
        if self.activation_scale is not None:
            assert firing_rates is not None
            scale = mean.sum() / firing_rates.sum().clamp_min(torch.finfo(mean.dtype).tiny)
            moved = self.activation_scale.lerp(scale, 1 - _SCALE_DECAY ** (1 / n_micro_batches))
            # the first batch sets it: from 0 it would take hundreds of steps, at slopes that are all wrong
            self.activation_scale.copy_(torch.where(self.activation_scale == 0, scale, moved))
        decay = self.cfg.ema_decay ** (1 / n_micro_batches)
        self.feature_acts_ema.lerp_(mean, 1 - decay)
        self.n_observed_steps.add_(1)

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Recompute the weights that enter the loss.

        ``u = 1 + (w - 1) * ramp``, times the starvation guard's factors if it is on.
        """
        weights = adaptive_weights(
            self.feature_acts_ema,
            gamma=self.cfg.gamma,
            reference_fraction=self.cfg.reference_fraction,
            weight_min=self.cfg.weight_min,
            weight_max=self.cfg.weight_max,
        )
        self.l1_weights.fill_(1).lerp_(weights, self.ramp)
        if self.firing_rate_ema is not None:
            self.l1_weights.mul_(self._guard(self.firing_rate_ema))

    def _guard(self, firing_rates: Tensor) -> Tensor:
        return starvation_guard(firing_rates, fraction=self.cfg.starvation_guard, minimum=self.cfg.guard_min)

    @property
    def counts_firings(self) -> bool:
        """Whether :meth:`observe` needs firing rates."""
        return self.firing_rate_ema is not None or self.activation_scale is not None

    def observe_and_refresh(
        self, mean_feature_acts: Tensor, n_firings: Tensor | None, n_tokens: int, schedule: StepSchedule
    ) -> None:
        """Reduce a batch's statistics over the ranks, observe them, and refresh the weights if it is time; in
        eval mode nothing.

        Args:
            mean_feature_acts: Over this rank's batch, shape (d_sae,).
            n_firings: How often each feature fired in it, shape (d_sae,); needed where ``counts_firings``.
            n_tokens: Size of the batch.
            schedule: What the driver decides.
        """
        if not self.training:
            return
        mean, rates = mean_feature_acts.to(self.feature_acts_ema.dtype), None
        if n_firings is None:
            mean = schedule.reduce_mean(mean)
        else:  # one collective for both
            mean, rates = schedule.reduce_mean(torch.stack((mean, n_firings.to(mean.dtype) / n_tokens)))
        self.observe(mean, rates, n_micro_batches=schedule.n_micro_batches)
        if schedule.refresh_weights:
            self.refresh_weights()

    def observe_dense(self, feature_acts: Tensor, schedule: StepSchedule) -> None:
        """:meth:`observe_and_refresh` with the statistics of a dense code (..., d_sae)."""
        by_token = feature_acts.detach().flatten(end_dim=-2)
        counts = by_token.count_nonzero(dim=0) if self.counts_firings else None
        # h >= 0, so |h| is h; the mean is taken in at least float32 since a bf16 mean over a batch loses rare
        # features.
        mean = by_token.mean(dim=0, dtype=self.feature_acts_ema.dtype)
        self.observe_and_refresh(mean, counts, len(by_token), schedule)

    @torch.no_grad()
    def set_ramp(self, ramp: float) -> None:
        """Let the adaptive weights in by ``ramp``, a number in [0, 1], from the next refresh on."""
        if not 0 <= ramp <= 1:
            raise ValueError(f"ramp must be in [0, 1], got {ramp}")
        self.ramp.fill_(ramp)

    def scheduled_ramp(self, n_steps: int) -> float:
        """The ramp that the config asks for at training step ``n_steps``, the first being 1.

        Raises:
            ValueError: For a length that is a share: a trainer without hooks does not say how long a run is.
        """
        in_steps(self.cfg.l1_warmup_steps, None, "l1_warmup_steps")
        return warmup_ramp(
            n_steps,
            delay_steps=in_steps(self.cfg.warmup_delay_steps, None, "warmup_delay_steps"),
            ramp_steps=in_steps(self.cfg.warmup_ramp_steps, None, "warmup_ramp_steps"),
        )

    def adaptive_metrics(self) -> dict[str, Callable[[], Tensor]]:
        """What to log of the state, computed when called."""
        metrics: dict[str, Callable[[], Tensor]] = {
            "l1_weight_mean": lambda: self.l1_weights.mean(),
            "l1_weight_pinned_max": lambda: (self.l1_weights >= self.cfg.weight_max).float().mean(),
            "l1_weight_pinned_min": lambda: (self.l1_weights <= self.cfg.weight_min).float().mean(),
            "adaptive_ramp": lambda: self.ramp.clone(),
        }
        if (rates := self.firing_rate_ema) is not None:
            metrics["guarded_share"] = lambda: (self._guard(rates) < 1).float().mean()
        if (scale := self.activation_scale) is not None:
            metrics["activation_scale"] = lambda: scale.clone()
        return metrics

    def adaptive_state(self) -> dict[str, Tensor]:
        """Copies of the running means, the L1 weights, the ramp and the number of observed steps, contiguous."""
        state = {name: getattr(self, name) for name in STATE_BUFFERS if name != "decoder_norm"}
        return {name: value.detach().cpu().clone() for name, value in state.items() if value is not None}

    # --- decoder rows of fixed norm ------------------------------------------------------------------------
    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Project the decoder rows back to their norm (1 until a scaling is folded in)."""
        if self.W_dec.dtype == self.decoder_norm.dtype:
            self.W_dec.addcmul_(self.W_dec, self._row_growth(self.W_dec))
        else:
            exact = self.W_dec.to(self.decoder_norm.dtype)
            self.W_dec.copy_(exact.addcmul(exact, self._row_growth(exact)))

    def _row_growth(self, W_dec: Tensor, decoder_norm: Tensor | None = None) -> Tensor:
        """(rows, 1): what of itself each row lacks to its norm, as a factor."""
        norm = torch.linalg.vector_norm(W_dec.detach(), dim=-1, keepdim=True).clamp_min_(1e-12)
        wanted = (self.decoder_norm if decoder_norm is None else decoder_norm).unsqueeze(1)
        # a row that is right to rounding stays as it is, so that projecting twice, as an export does, changes
        # nothing
        return hardshrink((wanted - norm).div_(norm), lambd=8 * torch.finfo(norm.dtype).eps)

    def folded_to_unit_rows(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """Encoder, encoder bias and decoder whose rows have their norm, with the function that the given ones
        have.

        After an optimizer step without the projection that follows it, rows are off their norm; dropping the
        difference would change the function. It goes into ``W_enc`` and ``b_enc``, and features grow by what
        their rows shrink.
        """
        W_dec = state_dict["W_dec"]
        scale = 1 + self._row_growth(W_dec.detach().to(self.decoder_norm.dtype)).squeeze(1)
        exact = {name: state_dict[name].to(scale.dtype) for name in ("W_enc", "b_enc", "W_dec")}
        folded = {
            "W_enc": exact["W_enc"] / scale,
            "b_enc": exact["b_enc"] / scale,
            "W_dec": exact["W_dec"] * scale.unsqueeze(1),
        }
        return {name: value.to(W_dec.dtype).contiguous() for name, value in folded.items()}, 1 / scale

    # --- loading -------------------------------------------------------------------------------------------
    def complete_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Cast the state back to its precision, which SAELens's loader took, and add what an older or an
        inference folder lacks.
        """
        for name, start in _START.items():
            buffer: Tensor | None = getattr(self, name)
            if buffer is None:
                state_dict.pop(name, None)
            else:  # the loader makes this SAE on the meta device, so a start is made anew
                found = state_dict.get(
                    name, torch.full(buffer.shape, start, device=state_dict["W_dec"].device)
                )
                state_dict[name] = found.to(buffer.dtype)


def _state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
