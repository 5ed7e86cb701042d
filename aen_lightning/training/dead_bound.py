"""How many features are dead at most, without waiting for the device that counts them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from aen_lightning.device_copies import HostCopy

_EVERY = 10
_ROUNDED_TO = 256


class DeadBound:
    """An upper bound on the dead features of a step, known on the host.

    A feature is dead in a step if it was silent for more than a window of steps before. It is counted once in
    ``_EVERY`` steps how many could be by the time that the next count is used, which is then long there: those that are
    silent for two such spells less than the window. Only the first step waits.
    """

    def __init__(self) -> None:
        self._n_steps = 0
        self._bound = 0
        self._arriving: HostCopy | int = 0

    def next_step(self, silent_steps: Tensor, window: int) -> int:
        """The bound for the step that begins.

        Args:
            silent_steps: (d_sae,), for how many steps each feature has been silent; from one step to the next they
                grow by 1 at most.
            window: More silent steps than these make a feature dead.
        """
        if self._n_steps % _EVERY == 0:
            if self._n_steps:
                self._bound = self._number()
            count = HostCopy((silent_steps > window - 2 * _EVERY).sum())
            self._arriving = count
            if not self._n_steps:
                self._bound = count.numbers()
        self._n_steps += 1
        # of few sizes, which a device plans for once each
        rounded = -(-self._bound // _ROUNDED_TO) * _ROUNDED_TO
        return min(rounded, silent_steps.numel())

    def _number(self) -> int:
        arriving = self._arriving
        return int(arriving.numbers()) if isinstance(arriving, HostCopy) else arriving

    def state_dict(self) -> dict[str, int]:
        """Where it stands, as plain values: a resumed run then takes the very steps of an uninterrupted one."""
        return {"n_steps": self._n_steps, "bound": self._bound, "arriving": self._number()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._n_steps, self._bound = state_dict["n_steps"], state_dict["bound"]
        self._arriving = state_dict["arriving"]
