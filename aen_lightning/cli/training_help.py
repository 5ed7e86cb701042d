"""The short help of the commands that LightningCLI parses.

What matters on one page; ``--help_all`` shows the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from aen_lightning.cli.errors import UsageError
from aen_lightning.cli.help import Option, annotation, meaning, options_in_source, page

Section: TypeAlias = tuple[str, Sequence[Option]]

_TRAINING = ("lr", "lr_warm_up_steps", "lr_decay_steps", "optimizer", "dead_feature_window", "seed")
_REFIT = ("dictionary", *_TRAINING[:-1])
_TRAINING_CLASSES = ("training.optimizer:OptimizerSettings", "training.base:SAETrainingModule")
_DATA = (
    ("synthetic", "SpikedDataModule"),
    ("activations", "ActivationsDataModule"),
    ("text", "TextActivationsDataModule"),
)
# SAELens's own fields, and the paper's lambdas, which our config's docstring does not list
_SAE = (
    Option(
        "architecture",
        "str",
        "'aen'",
        "Any that SAELens can train: aen, standard, topk, batchtopk, jumprelu, gated, ...",
    ),
    Option("d_in", "int", None, "Width of the activations."),
    Option("d_sae", "int", None, "Number of features."),
    Option(
        "lambda_1",
        "float",
        "None",
        "The paper's L1 coefficient, instead of l1_coefficient = d_in * lambda_1.",
    ),
    Option(
        "lambda_2",
        "float",
        "None",
        "The paper's L2 coefficient, instead of l2_coefficient = d_in * lambda_2.",
    ),
)
_RUN = (
    Option(
        "--config",
        "str",
        "None",
        "A file of settings or the name of a recipe; options that follow change single values.",
    ),
    Option(
        "--preset",
        "str",
        "None",
        "paper or recommended: settings for what is not given.",
    ),
    Option("--l0", "float", "None", "Active features per token that preset recommended aims at. None: 32."),
    Option("--trainer.max_steps", "int", "-1", "Training steps: the end of the run, as streams are endless."),
    Option(
        "--trainer.devices",
        "int",
        "'auto'",
        "GPUs or processes; several need --trainer.strategy=ddp. A batch is per rank.",
    ),
    Option("--trainer.precision", "str", "'32-true'", "Such as bf16-mixed."),
    Option(
        "--trainer.gradient_clip_val",
        "float",
        "None",
        "Largest norm of the gradient, of each SAE on its own.",
    ),
    Option("--trainer.val_check_interval", "int", "None", "Training steps between two validations."),
    Option(
        "--trainer.default_root_dir", "str", "None", "Where version_0, version_1, ... go. None: this folder."
    ),
    Option("--seed_everything", "int", "0", "Seed of all that is random."),
    Option("--num_threads", "int", "None", "CPU threads of torch. None: torch's own choice."),
)
_CKPT_PATH = Option(
    "--ckpt_path",
    "str",
    "None",
    "Checkpoint to go on from, or to validate or test; last: the newest of such a run.",
)
_RESUME = (
    Option(
        "--resume",
        "auto",
        "None",
        "Go on from the newest whole checkpoint with these settings, if there is any.",
    ),
    Option("--force_resume", "bool", "False", "Go on from a checkpoint of a run with other settings."),
)


def training_help(command: str, common: Sequence[Option] = ()) -> str:
    """The help page of a command that LightningCLI parses; ``common`` are options taken care of elsewhere."""
    description, sections = _PAGES[command]
    usage = f"aen {command} --config FILE_OR_RECIPE [--KEY VALUE ...]"
    note = f"Every key of the config is an option. [value]: default. All of them: aen {command} --help_all"
    parts = sections()
    parts[-1] = (parts[-1][0], [*parts[-1][1], *common])
    return page(usage, f"{description} {note}", parts, one_line=True)


def _options(*classes: str) -> list[Option]:
    """The options of classes as ``training.module:SAEModule``, one after the other."""
    return [option for name in classes for option in options_in_source(*name.split(":"))[1]]


def _data() -> Section:
    rows = [Option(name, "", "()", options_in_source(f"data.{module}", name)[0]) for module, name in _DATA]
    return "The data, --data CLASS and --data.KEY (the keys: aen fit --data.help CLASS):", rows


def _fit() -> list[Section]:
    training = _options(*_TRAINING_CLASSES, "training.module:SAEModule")
    sae = (
        "The SAE, --model.sae.KEY, here of architecture aen (of another: aen fit --model.sae.help jumprelu):"
    )
    return [
        (sae, [*_SAE, *_options("saes.aen_config:AENTrainingSAEConfig")]),
        ("Its training, --model.KEY:", [o for o in training if o.name in _TRAINING]),
        _data(),
        ("The run:", [*_RUN, _CKPT_PATH, *_RESUME]),
    ]


def _refit() -> list[Section]:
    model = [o for o in _options("training.refit:RefitModule", *_TRAINING_CLASSES) if o.name in _REFIT]
    run = [o for o in _RUN if o.name not in ("--preset", "--l0")]
    return [("The refit, --model.KEY:", model), _data(), ("The run:", run)]


def _harvest() -> list[Section]:
    text = {o.name: o for o in _options("data.options:DatasetOptions", "harvest.data:HarvestDataModule")}
    del text["model_name"], text["revision"]  # HarvestCLI takes these two from the language model
    return [
        ("The language model, --model.KEY:", _options("harvest.module:HarvestModule")),
        ("The text, --data.KEY:", list(text.values())),
        ("The set of activations, --shards.KEY:", _options("harvest.writer:ShardWriter")),
        ("The run:", [o for o in _RUN if o.name in ("--config", "--trainer.devices")]),
    ]


def _plan() -> list[Section]:
    tflops = Option(
        "--tflops_per_s",
        "float",
        "None",
        "What one rank sustains, in 1e12 operations per second: gives times.",
    )
    measured = Option(
        "--measured",
        "FILE",
        "None",
        "From benchmarks/gpu_step.py --json: each measured step beside its prediction.",
    )
    return [("", [_RUN[0], tflops, measured])]


_PAGES: dict[str, tuple[str, Callable[[], list[Section]]]] = {
    "fit": ("Train an SAE on a stream of activations. `aen recipes list` names the recipes.", _fit),
    "validate": ("Metrics of a checkpoint on the validation split of the data it was trained on.", _fit),
    "test": ("Metrics of a checkpoint on the test split of the data it was trained on.", _fit),
    "sweep": (
        "Train a grid of SAEs on one stream and compare them. model.sae may hold a list of values for any "
        "key, or be a list "
        "of such dicts; model.seed may be a list.",
        _fit,
    ),
    "refit": (
        "Refit a dictionary on its own support: what an L1 penalty shrank is restored, L0 and dead "
        "features stay.",
        _refit,
    ),
    "harvest": (
        "Write a language model's activations to disk. Run again after a stop, it goes on where it was.",
        _harvest,
    ),
    "plan": (
        "Parameters, memory per rank, disk, FLOPs and time of a recipe of `aen fit` or `aen harvest`, "
        "without running it.",
        _plan,
    ),
}


def sae_help(architecture: str) -> str:
    """The fields of the training config of an architecture, from SAELens's registry.

    Raises:
        UsageError: If SAELens can train none of that name.
    """
    from aen_lightning.saes.from_dict import config_class

    try:
        cls = config_class(architecture)
    except ValueError as error:
        raise UsageError(str(error)) from error
    fields = [f for f in dataclasses.fields(cls) if f.init and f.name != "metadata"]
    options = [Option(f.name, annotation(f.type), _default(f), _meaning_of(cls, f.name)) for f in fields]
    if architecture == "aen":
        options += [o for o in _SAE if o.name.startswith("lambda")]
    return page(
        f"aen fit --model.sae='{{architecture: {architecture}, d_in: ..., d_sae: ..., ...}}'",
        f"The fields of {cls.__name__}, as --model.sae.KEY or in YAML. [value]: default.",
        [("", options)],
    )


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return None if field.default_factory is dataclasses.MISSING else "()"


def _meaning_of(cls: type, name: str) -> str:
    """By the class or the nearest base that says it; SAELens documents some fields nowhere."""
    ours = {option.name: option.meaning for option in _SAE}
    return next((text for base in cls.__mro__ if (text := meaning(base, name))), ours.get(name, ""))
