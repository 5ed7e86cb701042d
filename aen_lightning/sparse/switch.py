"""When to leave the dense path, and when to go back to it."""

from __future__ import annotations

from typing import Any

from aen_lightning.sparse.codes import DenseCode, SparseCode

# Above it the full-precision product is cheaper than the candidates that screening leaves (measured, AMX).
_SCREENING_DENSITY = 0.012


class DensitySwitch:
    """Chooses between the dense and the sparse step by the density of recent codes.

    Both give the same loss and gradients to rounding, so switching shows in the time only. Training starts
    dense. A dense code is counted on the first step and then once every ``every_n_steps`` (a device
    synchronisation); a sparse code knows its size. :attr:`screen` is for :func:`encode`: False while a sparse
    code is too dense for screening to pay, else None.

    Args:
        threshold: Go sparse when at most this share of the code is non-zero, in (0, 1). The default is where
            ``benchmarks/train_step.py --crossover`` still finds the sparse step clearly cheaper on CPU (they
            cost the same at about 0.11).
        hysteresis: Go back to dense above ``threshold * hysteresis``, at least 1, so that noise does not flip
            it.
        every_n_steps: How often a dense code is counted, in steps.
    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, threshold: float = 0.08, hysteresis: float = 1.5, every_n_steps: int = 10) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be a share of non-zeros in (0, 1), got {threshold}")
        if hysteresis < 1:
            raise ValueError(f"hysteresis must be at least 1, got {hysteresis}")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.threshold = threshold
        self.hysteresis = hysteresis
        self.every_n_steps = every_n_steps
        self.sparse = False
        self.screen: bool | None = None
        self._steps_dense = 0

    def observe(self, code: SparseCode | DenseCode) -> None:
        """Take note of a training step's code.

        :attr:`sparse` then says which path the next step should take.
        """
        if isinstance(code, SparseCode):
            self._steps_dense = 0
            self.sparse = code.density <= self.threshold * self.hysteresis
            self.screen = None if code.density <= _SCREENING_DENSITY else False
            return
        if self._steps_dense % self.every_n_steps == 0:
            # feature_counts is what the step's statistics use anyway: counted once.
            size = max(1, code.shape[0] * code.shape[1])
            self.sparse = int(code.feature_counts.sum()) / size <= self.threshold
        self._steps_dense += 1

    def state_dict(self) -> dict[str, bool | int | None]:
        """Where it stands, as plain values.

        A resumed run then takes the very steps of an uninterrupted one.
        """
        return {"sparse": self.sparse, "screen": self.screen, "steps_dense": self._steps_dense}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.sparse, self.screen = state_dict["sparse"], state_dict["screen"]
        self._steps_dense = state_dict["steps_dense"]
