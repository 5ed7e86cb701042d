"""Registers the SAELens architecture ``aen`` when SAELens is imported, not before.

``import aen_lightning`` promises that SAELens knows ``aen`` from then on. SAELens takes seconds to import,
with torch and transformers beneath it, and ``aen --help`` needs none of them. So the promise is kept at the
one moment when it begins to matter: right after SAELens itself has been imported, by whomever. This module
imports nothing but the standard library.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_sae_lens() -> None:
    """Register ``aen`` and ``aen_gated`` now if SAELens is there, else as soon as it is; a second call does no harm."""
    after_import(
        "sae_lens", lambda: importlib.import_module("aen_lightning.saes.aen_gated")
    )  # which registers itself, and `aen`, of which it is made


def after_import(name: str, action: Callable[[], object]) -> None:
    """Run ``action`` once the top-level module ``name`` is imported: now, if it is already; only the first
    action counts.

    An error while the module is imported stays what it is, and ``action`` waits for the next attempt. An
    error of ``action`` itself is raised where the module is imported.
    """
    if sys.modules.get(name) is not None:
        action()
    elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, action))


class _AfterImport(MetaPathFinder):
    """Lets the other finders find the module, and its own loader load it.

    Takes itself away once that has happened.
    """

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: Loader) -> None:
        # on the instance, which belongs to this spec alone: the loader keeps its type and all its other
        # methods
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            del loader.exec_module  # the loader is as it was
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.action()

        loader.exec_module = exec_module  # type: ignore[method-assign]
