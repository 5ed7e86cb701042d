"""A training step's output whose activations are made when they are asked for."""

from __future__ import annotations

from typing import Any

from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from aen_lightning import sparse


class CodedStepOutput(TrainStepOutput):
    """SAELens's output of a step, with the code in place of the activations.

    ``feature_acts`` and ``hidden_pre`` are made of it at the first look: of the pre-activations only the positive ones
    are known, and they are the activations. A driver that looks at neither, at most steps, saves the making, and the
    waiting for a code whose size only the device knows.

    Args:
        code: The step's code.
        **rest: As for ``TrainStepOutput``, less the activations.
    """

    def __init__(self, code: sparse.SparseCode | sparse.DenseCode, **rest: Any) -> None:
        self.code = code
        self._feature_acts: Tensor | None = None
        super().__init__(feature_acts=None, hidden_pre=None, **rest)

    @property
    def feature_acts(self) -> Tensor:
        """(batch, d_sae) activations, dense or a coalesced COO tensor."""
        if self._feature_acts is None:
            self._feature_acts = self.code.feature_acts()
        return self._feature_acts

    @feature_acts.setter
    def feature_acts(self, value: Tensor | None) -> None:
        self._feature_acts = value

    @property
    def hidden_pre(self) -> Tensor:
        """The activations."""
        return self.feature_acts

    @hidden_pre.setter
    def hidden_pre(self, value: Tensor | None) -> None:
        if value is not None:
            self._feature_acts = value
