"""``--config``: a recipe's name stands for its file, and the file is looked at before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from aen_lightning.cli.errors import UsageError, one_line
from aen_lightning.cli.recipes import find_config

_OPTIONS = ("--config", "-c")


def with_configs_found(args: Sequence[str]) -> list[str]:
    """The arguments with the file for each ``--config NAME_OR_FILE``.

    Raises:
        UsageError: If there is no such file or recipe, or it holds no settings.
    """
    found: list[str] = []
    expects_config = False
    for arg in args:
        option, equals, value = arg.partition("=")
        if expects_config:
            arg = str(_checked(arg))
        elif option in _OPTIONS and equals:
            arg = f"{option}={_checked(value)}"
        expects_config = arg in _OPTIONS
        found.append(arg)
    return found


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        UsageError: If it is no YAML, is empty, or holds something else than settings by name.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {one_line(error)}") from error
    if config is None:
        raise UsageError(f"{path} is empty")
    if not isinstance(config, dict):
        raise UsageError(f"{path} must hold sections such as trainer, model and data, got a {type(config).__name__}")
    return config


def _checked(name: str) -> Path:
    try:
        path = find_config(name)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    read_config(path)
    return path
