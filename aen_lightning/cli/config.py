"""``--config``.

A recipe's name stands for its file, and the file is looked at before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from aen_lightning.cli.errors import UsageError, one_line
from aen_lightning.cli.recipes import find_config

_OPTION = "--config"  # `normalized` has made it of -c


def with_configs_found(args: Sequence[str]) -> list[str]:
    """The arguments with the file for each ``--config NAME_OR_FILE``.

    Raises:
        UsageError: If there is no such file or recipe, or it holds no settings.
    """
    found: list[str] = []
    for arg, previous in zip(args, ["", *args], strict=False):
        option, equals, value = arg.partition("=")
        if previous == _OPTION:
            arg = str(_checked(arg))
        elif option == _OPTION and equals:
            arg = f"{option}={_checked(value)}"
        found.append(arg)
    return found


def configs_in(args: Sequence[str]) -> list[Path]:
    """The files that the arguments name, in order."""
    found = with_configs_found(args)
    after = [Path(arg) for arg, previous in zip(found, ["", *found], strict=False) if previous == _OPTION]
    return after + [Path(arg.partition("=")[2]) for arg in found if arg.startswith(f"{_OPTION}=")]


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        UsageError: If it is no YAML, is empty, holds something else than settings by name, or an empty ``trainer``.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        what = f"{error.problem} in line {mark.line + 1}" if mark else one_line(error)  # type: ignore[union-attr]
        raise UsageError(f"{path} is not valid YAML: {what}") from error
    if config is None:
        raise UsageError(f"{path} is empty")
    if not isinstance(config, dict):
        raise UsageError(
            f"{path} must hold sections such as trainer, model and data, got a {type(config).__name__}"
        )
    if config.get("trainer", {}) is None:  # Lightning would make a Trainer of None
        raise UsageError(
            f"{path} has an empty section trainer: give it settings, such as max_steps, or remove it"
        )
    return config


def _checked(name: str) -> Path:
    try:
        path = find_config(name)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    read_config(path)
    return path
