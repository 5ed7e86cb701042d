"""``aen fit | validate | test``: LightningCLI around SAEModule."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import aen_lightning.data  # noqa: F401  # lets a config name our data modules by class name alone
from aen_lightning.callbacks import Interrupted
from aen_lightning.cli.config import with_configs_found
from aen_lightning.cli.errors import UsageError, explain
from aen_lightning.cli.output import is_quiet, remark
from aen_lightning.cli.parser import OneLineErrors, normalized
from aen_lightning.cli.presets import ChosenPreset, add_preset_arguments
from aen_lightning.cli.resume import checkpoint_to_resume, remove_failed_start, resume_line
from aen_lightning.cli.run_progress import RunProgress
from aen_lightning.cli.saved_config import SaveConfigWithoutSecrets
from aen_lightning.cli.summary import say_metrics, say_result
from aen_lightning.runs.checkpoint import require_checkpoint
from aen_lightning.saes.aen_config import AENTrainingSAEConfig
from aen_lightning.training.module import SAEModule


class TrainingParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser, with one line for an error."""

    usage_line = "--config FILE_OR_RECIPE [--KEY VALUE ...]"

    def option_names(self, parser: Any) -> list[str]:
        """The SAE's fields too, which to the parser are keys of a dict."""
        names = super().option_names(parser)
        fields = [f.name for f in dataclasses.fields(AENTrainingSAEConfig)] if "model.sae" in names else []
        return names + [f"model.sae.{name}" for name in fields]


@contextmanager
def errors_of_use(cli: LightningCLI) -> Iterator[None]:
    """Turns what is wrong with a config into a :class:`UsageError`, until the first step is taken.

    After that an error is no longer one of use: it keeps its traceback.
    """
    try:
        yield
    except UsageError:
        raise
    except (ValueError, TypeError, OSError, MisconfigurationException) as error:
        trainer = getattr(cli, "trainer", None)
        if trainer is not None and trainer.global_step > 0:
            raise
        hint = (
            " (trainer.accelerator=auto takes what is there)"
            if "No supported gpu backend" in str(error)
            else ""
        )
        raise UsageError(explain(str(error), []) + hint) from error


class OneLineCLI(LightningCLI):
    """LightningCLI that takes recipe names for configs and says what is wrong in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with errors_of_use(self):
            super().__init__(*args, **{"parser_class": TrainingParser, **kwargs})

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """As LightningCLI's, without abbreviations: a misspelt option must not be taken for another."""
        return super().init_parser(**{"prog": "aen", **kwargs}, allow_abbrev=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what was typed after ``aen``.

        ``sys.argv`` stays as it is, since Lightning starts the other ranks of a run from it; LightningCLI
        would warn of that.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
            super().parse_arguments(parser, with_configs_found(normalized(args)))
        _check_checkpoint(self.config.get(str(self.config.get("subcommand")), self.config).get("ckpt_path"))

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Show progress our way, and no table of a model that is one SAE."""
        section = self.config_init.get(str(self.subcommand), self.config_init)
        given = {**(section.get("trainer") or {}), **kwargs}
        callbacks = given.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if given.get("enable_progress_bar") is not False and not any(
            isinstance(c, pl.callbacks.ProgressBar) for c in callbacks
        ):
            kwargs["callbacks"] = [*callbacks, RunProgress()]
        if given.get("enable_model_summary") is None:
            kwargs["enable_model_summary"] = False
        return super().instantiate_trainer(**kwargs)


class AENCLI(OneLineCLI):
    """LightningCLI with presets, and a CSV and a TensorBoard log by default, both in one folder per run.

    Args:
        model_class: What is trained.
        args: What was typed after ``aen COMMAND``, with the subcommand of LightningCLI before it.
        command: Where it is not the subcommand.
        run: Run it, not only put it together.
    """

    takes_presets = True

    def __init__(
        self,
        model_class: type[pl.LightningModule],
        args: Sequence[str],
        *,
        command: str | None = None,
        run: bool = True,
    ) -> None:
        prepare_process()
        self._preset_parsers: list[LightningArgumentParser] = []
        self._run_folder: Path | None = None
        try:
            super().__init__(
                model_class,
                pl.LightningDataModule,
                subclass_mode_data=True,
                seed_everything_default=0,
                save_config_callback=SaveConfigWithoutSecrets,
                save_config_kwargs={"overwrite": True},
                args=args,
                run=run,
            )
        except BaseException as error:
            if self._run_folder is not None and rank_zero_only.rank == 0:
                remove_failed_start(self._run_folder)
            if isinstance(error, Interrupted) and error.code:
                line = resume_line(command or args[0], args[1:], error.checkpoint)
                print(f"aen {command or args[0]}: {error}; to go on:\n{line}", file=sys.stderr)
            raise

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings of the process that are no business of the model's."""
        parser.add_argument(
            "--num_threads",
            type=int | None,
            default=None,
            help="CPU threads of torch in this process. null: torch's default. One is often faster on shared "
            "cores.",
        )
        parser.add_argument(
            "--resume",
            type=Literal["auto"] | None,
            default=None,
            help="auto: go on from the newest whole checkpoint of the newest run with these settings in "
            "trainer.default_root_dir, or begin anew if there is none.",
        )
        parser.add_argument(
            "--force_resume",
            type=bool,
            default=False,
            help="Go on from a checkpoint of a run with other settings, which are named.",
        )
        if self.takes_presets:
            add_preset_arguments(parser)
            self._preset_parsers.append(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Once for the preset, and with a preset once more: its settings are defaults, so that given ones win.

        The checkpoint's path is kept from LightningCLI until it has read the configuration: it would replace the
        model's settings by those in the checkpoint, whatever was typed; we compare them.
        """
        self._parse_with_preset(parser, args)
        self._ckpt_path = self._section().get("ckpt_path")
        if self._ckpt_path is not None:
            self._section()["ckpt_path"] = None

    def _parse_with_preset(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        if not self.takes_presets:
            return
        chosen = ChosenPreset(self._section())
        if defaults := chosen.defaults():
            for each in self._preset_parsers:
                try:
                    each.set_defaults(defaults)
                except KeyError as error:
                    raise UsageError(f"presets.{chosen.name} sets what is no setting: {error}") from error
            super().parse_arguments(parser, args)
        chosen.expand(self._section())

    def _section(self) -> Any:
        return self.config.get(str(self.config.get("subcommand")), self.config)

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
        config = self.config.get(str(self.subcommand), self.config)
        if self._ckpt_path is not None:
            config["ckpt_path"] = self._ckpt_path
        if config.get("resume") == "auto" or config.get("ckpt_path") == "last":
            found = checkpoint_to_resume(config.as_dict())
            config["ckpt_path"], config["resume"] = None if found is None else str(found), None

    def instantiate_classes(self) -> None:
        """Tell the module how it was configured, for its checkpoints."""
        super().instantiate_classes()
        self.model.run_config = self.config.get(str(self.subcommand), self.config).as_dict()
        self.model.accept_changed_config = bool(self._setting(self.config, "force_resume"))

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Give the Trainer both loggers where the config names none."""
        if self._setting(self.config_init, "trainer.logger") in (None, True) and "logger" not in kwargs:
            root = self._setting(self.config_init, "trainer.default_root_dir") or str(Path.cwd())
            csv = CSVLogger(root, name="")
            if not Path(csv.log_dir).exists():
                self._run_folder = Path(csv.log_dir)
            kwargs["logger"] = [csv, TensorBoardLogger(root, name="", version=csv.version)]
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Called by LightningCLI."""
        say_result(self.trainer)

    def before_validate(self) -> None:
        """Called by LightningCLI."""
        self._measure("validate")

    def before_test(self) -> None:
        """Called by LightningCLI."""
        self._measure("test")

    def _measure(self, command: str) -> None:
        given = self.config_init[command]
        given["verbose"] = False  # Lightning's table is ours to print
        if given.get("ckpt_path") is None and self.trainer.is_global_zero:
            remark("note: without --ckpt_path these are the metrics of an SAE with its first, random weights")

    def after_validate(self) -> None:
        """Called by LightningCLI."""
        say_metrics(self.trainer, "validate")

    def after_test(self) -> None:
        """Called by LightningCLI."""
        say_metrics(self.trainer, "test")


_UNREAD = (
    "💡 Tip", "TPU available: False", "GPU available: False", "Seed set to", "`Trainer.fit` stopped: `max_steps=",
)  # fmt: skip


def _worth_reading(record: logging.LogRecord) -> bool:
    """Keeps Lightning's advertisements, and what it says of hardware that is not there, off the screen."""
    if is_quiet() and record.levelno <= logging.INFO:
        return False
    return not record.getMessage().startswith(_UNREAD)


def fit(args: Sequence[str]) -> None:
    """``aen fit ...``.

    The word comes first in ``args``, as LightningCLI wants it, also ``validate`` and ``test``.
    """
    AENCLI(SAEModule, args)


def _check_checkpoint(path: str | None) -> None:
    """Refuse before any work what Lightning would stumble over when it restores."""
    # best, last, ... are words of Lightning's
    if path is None or "://" in path or path in ("best", "last", "hpc") or path.startswith("registry"):
        return
    if not Path(path).exists():
        raise UsageError(f"no checkpoint {path!r}")
    if Path(path).is_file():  # a sharded one is a folder
        try:
            require_checkpoint(path)
        except ValueError as error:
            raise UsageError(str(error)) from error


def prepare_process() -> None:
    """What a process that trains or harvests wants of the libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_worth_reading)
    # Lightning's own pytree helper trips a deprecation in torch 2.13; nothing a user could do about it
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
