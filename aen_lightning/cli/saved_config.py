"""The ``config.yaml`` that a run leaves: all that was asked for, but no secret."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback

from aen_lightning.files.redaction import REMOVED, is_secret_key, without_secrets


class SaveConfigWithoutSecrets(SaveConfigCallback):
    """LightningCLI's callback; access tokens and the like stay out of the file.

    A run from the file needs them again, best by a login or an environment variable.
    """

    def __init__(self, parser: Any, config: Namespace, *args: Any, **kwargs: Any) -> None:
        super().__init__(parser, _without_secrets(config), *args, **kwargs)


def _without_secrets(value: Any) -> Any:
    if not isinstance(value, Namespace):
        return without_secrets(value)
    clean = value.clone()
    for key, held in vars(value).items():
        secret = isinstance(held, str) and is_secret_key(key)
        setattr(clean, key, REMOVED if secret else _without_secrets(held))
    return clean
