"""When to leave the dense path, and when to go back to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from aen_lightning.device_copies import HostCopy
from aen_lightning.sparse.codes import DenseCode, SparseCode

# Above it the full-precision product is cheaper than the candidates that screening leaves (measured, AMX).
_SCREENING_DENSITY = 0.012
# CPU: where `benchmarks/train_step.py --crossover` still finds the sparse step clearly cheaper (they cost the same at
# about 0.11). CUDA: where the model of cost sees them even (not measured; `benchmarks/gpu_step.py` does).
_THRESHOLDS = {"cpu": 0.08, "cuda": 0.004}
_MIN_CAPACITY = 2**12
_ROOM = 1.5  # for the next code, times the last one


class DensitySwitch:
    """Chooses between the dense and the sparse step by the density of recent codes.

    Both give the same loss and gradients to rounding, so switching shows in the time only. Training starts
    dense. A dense code is counted on the first step and then once every ``every_n_steps``; on a CPU the count
    decides at once, elsewhere ``every_n_steps`` steps later, when it has long arrived, so that nothing waits for the
    device. A sparse code knows its size. :attr:`screen` and :attr:`capacity` are for :func:`encode`: ``screen`` is
    False while a sparse code is too dense for screening to pay, else None; ``capacity`` is room for the next code.

    Args:
        threshold: Go sparse when at most this share of the code is non-zero, in (0, 1). None: by device.
        hysteresis: Go back to dense above ``threshold * hysteresis``, at least 1, so that noise does not flip
            it.
        every_n_steps: How often a dense code is counted, in steps.
    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, threshold: float | None = None, hysteresis: float = 1.5, every_n_steps: int = 10
    ) -> None:
        if threshold is not None and not 0 < threshold < 1:
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
        self._nnz = 0
        self._counting: HostCopy | int | None = None

    def observe(self, code: SparseCode | DenseCode) -> None:
        """Take note of a training step's code.

        :attr:`sparse` then says which path the next step should take.
        """
        if isinstance(code, SparseCode):
            self._steps_dense, self._nnz, self._counting = 0, code.nnz, None
            self.sparse = code.density <= self._threshold(code.values) * self.hysteresis
            self.screen = None if code.density <= _SCREENING_DENSITY else False
            return
        if self._steps_dense % self.every_n_steps == 0:
            self._decide(code)
            # feature_counts is what the step's statistics use anyway: counted once.
            self._counting = HostCopy(code.feature_counts.sum())
            if code.values.device.type == "cpu":
                self._decide(code)
        self._steps_dense += 1

    def _decide(self, code: DenseCode) -> None:
        if (count := self._count()) is not None:
            self._nnz, self._counting = count, None
            size = max(1, code.shape[0] * code.shape[1])
            self.sparse = count / size <= self._threshold(code.values)

    def _count(self) -> int | None:
        return self._counting.numbers() if isinstance(self._counting, HostCopy) else self._counting

    def _threshold(self, values: Tensor) -> float:
        return _THRESHOLDS.get(values.device.type, 0.08) if self.threshold is None else self.threshold

    @property
    def capacity(self) -> int:
        """Room for a code somewhat larger than the last one that was counted, a power of two."""
        return max(_MIN_CAPACITY, 1 << (int(_ROOM * self._nnz) - 1).bit_length())

    def state_dict(self) -> dict[str, bool | int | None]:
        """Where it stands, as plain values.

        A resumed run then takes the very steps of an uninterrupted one.
        """
        return {
            "sparse": self.sparse,
            "screen": self.screen,
            "steps_dense": self._steps_dense,
            "nnz": self._nnz,
            "counting": self._count(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.sparse, self.screen = state_dict["sparse"], state_dict["screen"]
        self._steps_dense = state_dict["steps_dense"]
        # absent in checkpoints of earlier versions
        self._nnz, self._counting = state_dict.get("nnz", 0), state_dict.get("counting")
