"""The hard phase of an AEN-SAE: BatchTopK, TopK or JumpReLU on the weights that a penalised phase has made."""

from __future__ import annotations

from typing import get_args

import torch
from sae_lens.saes.topk_sae import TopK
from torch import Tensor, nn

from aen_lightning import sparse
from aen_lightning.saes.aen_config import AENTrainingSAEConfig, HardFinishName
from aen_lightning.saes.jump_thresholds import floor_of, floor_suffices, keep_above, keep_entries_above
from aen_lightning.saes.step_schedule import StepSchedule

_THRESHOLD_RATE = 0.01  # of the running threshold; SAELens's BatchTopK takes the same


def check_hard_finish(k: float, finish: str, prefix: str = "") -> None:
    """Refuse what no SAE can be hardened to.

    Args:
        k: See :meth:`HardPhase.harden`.
        finish: Likewise.
        prefix: What the messages begin the names with.

    Raises:
        ValueError: With the value and what was expected.
    """
    if finish not in get_args(HardFinishName):
        names = ", ".join(get_args(HardFinishName))
        raise ValueError(f"{prefix}finish must be one of {names}, got {finish!r}")
    if not k > 0:
        raise ValueError(f"{prefix}k must be above 0, got {k}")
    if finish == "topk" and k != int(k):
        raise ValueError(f"{prefix}k must be a whole number with finish 'topk', got {k}")


class HardPhase:
    """Mixin for a SAELens training SAE that can keep the largest activations of a batch, or of a token, only.

    Its state is ``cfg.hard_k``, ``cfg.hard_finish`` and, but for TopK, the buffers ``hard_threshold`` and ``n_hard_steps``
    (:class:`~aen_lightning.saes.adaptive.AdaptiveState`); for JumpReLU also the parameter ``threshold_offsets`` (d_sae,).
    """

    has_hard_phase = True

    cfg: AENTrainingSAEConfig
    training: bool
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    hard_threshold: Tensor
    n_hard_steps: Tensor
    threshold_offsets: nn.Parameter | None

    def prepare_hard_phase(self, finish: HardFinishName) -> None:
        """Make the parameters of a hard phase to come, at zero, before the optimizer is made; again does nothing.

        Args:
            finish: See :meth:`harden`.
        """
        self.cfg.hard_finish = finish
        if finish == "jumprelu" and self.threshold_offsets is None:
            self.threshold_offsets = nn.Parameter(torch.zeros_like(self.b_enc))

    @torch.no_grad()
    def harden(self, k: float, finish: HardFinishName = "batchtopk") -> None:
        """From now on keep the largest activations only, and drop the penalty; weights and statistics stay.

        The SAE is no longer differentiable throughout: activations that are not kept get no gradient.

        Args:
            k: Mean active features per token (a count), above 0 and at most d_sae; a whole number for ``topk``.
            finish: ``batchtopk`` keeps the ``k * batch`` largest activations of each batch; what is exported is a
                ``jumprelu`` SAE, whose threshold is the running mean of the least activation kept. ``topk`` keeps
                the ``k`` largest of each token, and is exported as ``topk``. ``jumprelu`` keeps as many as ``batchtopk``,
                each feature above a threshold of its own, which is trained: :meth:`prepare_hard_phase` comes first.

        Raises:
            ValueError: For another ``k`` or ``finish``.
            RuntimeError: For a ``jumprelu`` that was not prepared.
        """
        if not 0 < k <= self.cfg.d_sae:
            raise ValueError(f"k must be above 0 and at most d_sae {self.cfg.d_sae}, got {k}")
        check_hard_finish(k, finish)
        if finish == "jumprelu" and self.threshold_offsets is None:
            raise RuntimeError(
                "no thresholds to train: call prepare_hard_phase('jumprelu') before the optimizer is made"
            )
        self.cfg.hard_k, self.cfg.hard_finish = k, finish

    def hard_feature_acts(self, hidden_pre: Tensor) -> Tensor:
        """The activations (..., d_sae) of the exported dictionary, of which a batch is no part."""
        if self.cfg.hard_finish == "topk":
            return TopK(self.cfg.k)(hidden_pre)
        return hidden_pre.relu() * (hidden_pre > self.thresholds())

    def thresholds(self) -> Tensor:
        """What an activation has to exceed in the exported dictionary, a scalar or (d_sae,)."""
        if self.threshold_offsets is None:
            return self.hard_threshold
        return (self.hard_threshold + self.threshold_offsets.detach()).clamp_min(0)

    def keep_largest(self, hidden_pre: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's activations (..., d_sae) under BatchTopK or JumpReLU, and the least one kept, less its offset."""
        n_kept = self._n_kept(hidden_pre[..., 0].numel())
        if self.cfg.hard_finish == "jumprelu":
            assert self.threshold_offsets is not None
            return keep_above(hidden_pre, self.threshold_offsets, n_kept=n_kept)
        positive = hidden_pre.relu()
        least = positive.detach().flatten().topk(n_kept).values[-1]
        return positive * (positive.detach() >= least), least

    def jump_code(self, x: Tensor) -> tuple[sparse.SparseCode, Tensor, Tensor]:
        """What JumpReLU keeps of a batch (batch, d_in), computed on the non-zeros.

        Returns:
            A code of what is above the thresholds or counts for their gradient, the activations (nnz,) at its entries, 0
            where one is not kept, with a gradient, and the level, as of :meth:`keep_largest`.
        """
        assert self.threshold_offsets is not None
        encoder = (x, self.W_enc, self.b_enc, self.b_dec if self.cfg.apply_b_dec_to_input else None)
        n_kept, usual = self._n_kept(len(x)), self.hard_threshold
        code = sparse.encode(*encoder, threshold=floor_of(usual, self.threshold_offsets))
        acts, level = self._kept_of(code, encoder, n_kept)
        if not floor_suffices(usual, level, code.nnz, n_kept):
            code = sparse.encode(*encoder)
            acts, level = self._kept_of(code, encoder, n_kept)
        return code, acts, level

    def _kept_of(
        self, code: sparse.SparseCode, encoder: tuple[Tensor, Tensor, Tensor, Tensor | None], n_kept: int
    ) -> tuple[Tensor, Tensor]:
        assert self.threshold_offsets is not None
        values = sparse.activations(*encoder, code)
        return keep_entries_above(code, values, self.threshold_offsets, n_kept=n_kept)

    def _n_kept(self, batch: int) -> int:
        assert self.cfg.hard_k is not None
        return int(self.cfg.hard_k * batch)

    @torch.no_grad()
    def observe_threshold(self, least: Tensor, schedule: StepSchedule) -> None:
        """Move the running threshold towards the least activation kept in this batch, mean over the ranks."""
        if not self.training:
            return
        least = schedule.reduce_mean(least.to(self.hard_threshold.dtype))
        # the mean over the last quarter of the phase at first, so that it does not lag when the phase is short
        rate = (4 / (4 + self.n_hard_steps)).clamp_min(_THRESHOLD_RATE)
        self.hard_threshold.lerp_(least, rate.to(least.dtype))
        self.n_hard_steps.add_(1)

    def auxiliary_loss(
        self,
        x: Tensor,
        sae_out: Tensor,
        W_dec: Tensor,
        dead_neuron_mask: Tensor | None,
        n_dead_at_most: int | None = None,
    ) -> Tensor:
        """SAELens's auxiliary loss of TopK SAEs: silent features reconstruct what the others leave over.

        Args:
            x: (..., d_in), with the normalisation that acts outside the SAE.
            sae_out: Its reconstruction.
            W_dec: (d_sae, d_in), the decoder with the gradient that training wants.
            dead_neuron_mask: (d_sae,), who is silent; None: nobody.
            n_dead_at_most: A number that the silent ones do not exceed. None: their number, for which the host waits.

        Returns:
            A scalar, weighted; 0 if nobody is silent.
        """
        coefficient = self.cfg.aux_loss_coefficient
        if not coefficient or dead_neuron_mask is None:
            return sae_out.new_zeros(())
        room = int(dead_neuron_mask.sum()) if n_dead_at_most is None else n_dead_at_most
        if not room:
            return sae_out.new_zeros(())
        # the dead features come first; what else there is room for is left out of the choice, and not waited for
        rank = dead_neuron_mask.to(torch.uint8).sort(descending=True, stable=True)
        chosen, is_dead = rank.indices[:room], rank.values[:room].bool()
        wanted = self.cfg.aux_loss_k or max(1, x.shape[-1] // 2)
        shifted = x - self.b_dec if self.cfg.apply_b_dec_to_input else x
        hidden_pre = shifted @ self.W_enc[:, chosen] + self.b_enc[chosen]
        kept = hidden_pre.masked_fill(~is_dead, -torch.inf).topk(min(wanted, len(chosen)), sorted=False)
        values = kept.values.masked_fill(~is_dead[kept.indices], 0.0)
        acts = torch.zeros_like(hidden_pre).scatter(-1, kept.indices, values)
        error = (acts @ W_dec[chosen] - (x - sae_out).detach()).pow(2).sum(dim=-1).mean()
        return coefficient * (is_dead.sum().to(error.dtype) / wanted).clamp_max(1.0) * error
