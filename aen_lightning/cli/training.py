"""``aen fit | validate | test``: LightningCLI around SAEModule."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import aen_lightning.data  # noqa: F401  # lets a config name our data modules by class name alone
from aen_lightning.cli.recipes import find_config
from aen_lightning.training.module import SAEModule


class AENCLI(LightningCLI):
    """LightningCLI with a CSV and a TensorBoard log by default, both in one folder per run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except (ValueError, TypeError, OSError) as error:
            trainer = getattr(self, "trainer", None)
            # once steps were taken an error is no longer one of use: the command then shows where it came from
            error.aen_work_begun = trainer is not None and trainer.global_step > 0  # type: ignore[union-attr]
            raise

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings of the process that are no business of the model's."""
        parser.add_argument(
            "--num_threads",
            type=int | None,
            default=None,
            help="CPU threads torch uses in this process. None: torch's default. One thread is often faster on shared cores.",
        )

    def _setting(self, config: Any, key: str) -> Any:
        """A value that is in the subcommand's section if there are subcommands."""
        return config.get(str(self.subcommand), config).get(key)

    def before_instantiate_classes(self) -> None:
        """Apply process-wide settings before any tensor is made."""
        n_threads = self._setting(self.config, "num_threads")
        if n_threads is not None:
            if n_threads < 1:
                raise ValueError(f"num_threads must be >= 1, got {n_threads}")
            torch.set_num_threads(n_threads)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Give the Trainer both loggers where the config names none."""
        if self._setting(self.config_init, "trainer.logger") in (None, True) and "logger" not in kwargs:
            root = self._setting(self.config_init, "trainer.default_root_dir") or str(Path.cwd())
            csv = CSVLogger(root, name="")
            kwargs["logger"] = [csv, TensorBoardLogger(root, name="", version=csv.version)]
        return super().instantiate_trainer(**kwargs)


def run(args: Sequence[str]) -> int:
    """Run ``fit``, ``validate`` or ``test`` with LightningCLI's arguments; ``--config`` takes recipe names too."""
    prepare_arguments(args)
    AENCLI(SAEModule, pl.LightningDataModule, **TRAINING_OPTIONS)
    return 0


TRAINING_OPTIONS: dict[str, Any] = {
    "subclass_mode_data": True,
    "seed_everything_default": 0,
    "save_config_kwargs": {"overwrite": True},
}


def prepare_arguments(args: Sequence[str]) -> None:
    """Put the arguments, recipes resolved, where LightningCLI reads them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Lightning's own pytree helper trips a deprecation in torch 2.13; nothing a user could do about it
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    # through sys.argv, since Lightning starts the other ranks of a DDP run from it
    sys.argv[1:] = _resolve_configs(args)


def _resolve_configs(args: Sequence[str]) -> list[str]:
    resolved: list[str] = []
    expects_config = False
    for arg in args:
        if expects_config:
            arg = str(find_config(arg))
        elif arg.startswith(("--config=", "-c=")):
            option, _, value = arg.partition("=")
            arg = f"{option}={find_config(value)}"
        expects_config = arg in ("--config", "-c")
        resolved.append(arg)
    return resolved
