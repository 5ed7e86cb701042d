"""``aen saelens``: SAELens's own training command, in a process where ``aen`` is registered."""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Sequence

import aen_lightning  # noqa: F401  # registers the architecture


def saelens(args: Sequence[str]) -> None:
    """SAELens's training command, in a process where ``aen`` is registered."""
    module = "sae_lens.llm_sae_training_runner"
    before = sys.argv
    sys.argv = [module, *args]
    try:
        with warnings.catch_warnings():
            # runpy remarks that the module was imported before; so does plain `python -m` for this one
            warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
