"""Gives the SAEs of a module back when a fit ends, however it ends."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


class HandBack(pl.Callback):
    """Calls the module's ``hand_back`` after a fit, also after one that raised, for which a module has no
    hook.
    """

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The fit ended well."""
        pl_module.hand_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """The fit, or what came before its first step, raised."""
        pl_module.hand_back()
