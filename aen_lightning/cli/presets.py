"""``preset``, ``presets`` and ``l0`` of a config: what they add, and what the saved config says of it.

A value that is given, in a config or as an option, wins over ``presets.NAME`` of the config, that over the preset
itself (:mod:`aen_lightning.presets`), that over the defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from aen_lightning.cli.errors import UsageError
from aen_lightning.presets import DEFAULT_L0, PRESET_NAMES, Preset, preset, with_preset

_SECTIONS = ("model", "trainer")


def add_preset_arguments(parser: LightningArgumentParser) -> None:
    """The settings that this module is about."""
    parser.add_argument(
        "--preset",
        type=str | None,
        default=None,
        help="paper: the published settings. recommended: what works best. null: the defaults. A value that is "
        "given wins.",
    )
    parser.add_argument(
        "--l0",
        type=float | None,
        default=None,
        help=f"Mean active features per token that preset recommended aims at. null: {DEFAULT_L0}.",
    )
    parser.add_argument(
        "--presets",
        type=dict[str, dict[str, Any]] | None,
        default=None,
        help="What a preset sets besides in this config: sections model and trainer by its name.",
    )
    parser.add_argument(
        "--expanded_preset",
        type=str | None,
        default=None,
        help="In the config that a run saves: the preset whose settings it holds.",
    )


class ChosenPreset:
    """The preset that a parsed config asks for.

    Args:
        config: What was parsed, one command's section.

    Raises:
        UsageError: For an unknown preset, one that does not fit the architecture, or settings that go with none.
    """

    def __init__(self, config: Namespace) -> None:
        self.name: str | None = config["preset"]
        self._own = _own_sections(config["presets"])
        done = config["expanded_preset"]
        if done is not None and self.name not in (None, done):
            raise UsageError(
                f"this config holds the settings of preset {done!r}, which would win over those of "
                f"{self.name!r}: start from the recipe instead"
            )
        if self.name != "recommended" and config["l0"] is not None:
            raise UsageError(
                f"l0 is for preset 'recommended', got l0 {config['l0']:g} with preset {self.name or 'null'}: "
                "remove it, or set another preset"
            )
        self._preset = Preset() if self.name is None else self._found(config)

    def _found(self, config: Namespace) -> Preset:
        assert self.name is not None
        l0, known = config["l0"], {}
        for callback in _callbacks(config):
            known[resolve_name(callback.class_path).__name__] = callback.get("init_args", {})
        if l0 is None:  # the two that hold L0 must agree
            l0 = known.get("TargetL0", {}).get("l0") or known.get("HardFinish", {}).get("k") or DEFAULT_L0
        names = {name for block in _blocks(config.model.sae) for name in _architectures(block)}
        try:
            found = {name: preset(self.name, architecture=name, l0=l0) for name in sorted(names)}
        except ValueError as error:
            raise UsageError(str(error)) from error
        first, *others = found.values()
        if any(other != first for other in others):
            raise UsageError(
                f"preset {self.name!r} differs between the architectures {', '.join(found)}: run them one by one"
            )
        return first

    def defaults(self) -> dict[str, Any]:
        """What it sets besides the SAE and the callbacks, by dotted key."""
        own = self._own.get(self.name or "", {})
        model = {key: value for key, value in own.get("model", {}).items() if key != "sae"}
        values = {f"model.{key}": value for key, value in {**self._preset.training, **model}.items()}
        return values | {f"trainer.{key}": value for key, value in own.get("trainer", {}).items()}

    def expand(self, config: Namespace) -> None:
        """Write the SAE's fields and the callbacks into the config, which then needs no preset."""
        if self.name is None:
            return
        own = self._own.get(self.name, {}).get("model", {}).get("sae", {})
        fields = with_preset(own, self._preset.sae)
        sae = config.model.sae
        config.model.sae = (
            [with_preset(block, fields) for block in sae]
            if isinstance(sae, list)
            else with_preset(sae, fields)
        )
        given = _callbacks(config)
        present = [resolve_name(callback.class_path) for callback in given]
        for cls, arguments in self._preset.callbacks.items():
            if not any(issubclass(other, cls) for other in present):
                given.append(_callback(cls, arguments))
        config.trainer.callbacks = given
        config.expanded_preset, config.preset, config.presets, config.l0 = self.name, None, None, None


def _own_sections(presets: Any) -> dict[str, dict[str, dict[str, Any]]]:
    for name, sections in (presets or {}).items():
        if name not in PRESET_NAMES:
            raise UsageError(f"presets has {name!r}, which is no preset; there are {', '.join(PRESET_NAMES)}")
        for key, section in sections.items():
            if key not in _SECTIONS or not isinstance(section, dict):
                raise UsageError(
                    f"presets.{name} takes the sections model and trainer, got {key}: {section!r}"
                )
    return presets or {}


def _blocks(sae: Any) -> Iterator[dict[str, Any]]:
    """The dicts of ``model.sae``; what is wrong with another is said where it is built."""
    yield from (block for block in (sae if isinstance(sae, list) else [sae]) if isinstance(block, dict))


def _architectures(block: dict[str, Any]) -> list[str]:
    name = block.get("architecture", "aen")
    return name if isinstance(name, list) else [name]


def _callbacks(config: Namespace) -> list[Namespace]:
    given = config.trainer.callbacks
    return list(given) if isinstance(given, list) else [] if given is None else [given]


def _callback(cls: type[pl.Callback], arguments: dict[str, Any]) -> Namespace:
    known = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
    path = f"aen_lightning.callbacks.{cls.__name__}"
    return Namespace(class_path=path, init_args=Namespace(**{**known, **arguments}))
