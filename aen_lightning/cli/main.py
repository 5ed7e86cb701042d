"""The ``aen`` command."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from aen_lightning import __version__
from aen_lightning.cli import allocator
from aen_lightning.spelling import suggest

_TRAINING = ("fit", "validate", "test")


class _Command(NamedTuple):
    target: str  # module:function, imported when called
    help: str


COMMANDS = {
    "fit": _Command("aen_lightning.cli.training:run", "train an SAE: --config FILE_OR_RECIPE"),
    "validate": _Command(
        "aen_lightning.cli.training:run", "metrics on the validation split: --config ... --ckpt_path ..."
    ),
    "test": _Command("aen_lightning.cli.training:run", "metrics on the test split: --config ... --ckpt_path ..."),
    "sweep": _Command(
        "aen_lightning.cli.sweep:sweep_command", "train a grid of SAEs on one stream and compare them: --config ..."
    ),
    "refit": _Command(
        "aen_lightning.cli.refit:refit_command",
        "restore the magnitudes an L1 penalty shrank, L0 unchanged: --model.dictionary ...",
    ),
    "harvest": _Command(
        "aen_lightning.cli.harvest:harvest_command",
        "write a language model's activations to disk: --config FILE_OR_RECIPE",
    ),
    "shards": _Command("aen_lightning.cli.shards:shards_command", "verify, describe or convert activations on disk"),
    "plan": _Command(
        "aen_lightning.cli.plan:plan_command", "what a recipe takes: memory, disk, FLOPs, time; runs nothing"
    ),
    "evaluate": _Command(
        "aen_lightning.cli.evaluate:evaluate_command", "a dictionary's metrics on held-out text or shards"
    ),
    "diagnose": _Command(
        "aen_lightning.cli.diagnose:diagnose_command", "a dictionary's geometry, stability and coding gap"
    ),
    "compare": _Command("aen_lightning.cli.compare:compare_command", "which features several dictionaries share"),
    "report": _Command(
        "aen_lightning.cli.report:report_command", "one self-contained HTML page about one or several runs"
    ),
    "push": _Command("aen_lightning.cli.hub:push_command", "publish a run's dictionaries on the Hugging Face Hub"),
    "pull": _Command("aen_lightning.cli.hub:pull_command", "list a Hub repo's dictionaries, or fetch one"),
    "import": _Command(
        "aen_lightning.cli.hub:import_command", "make SAELens dictionaries of the paper authors' checkpoints"
    ),
    "recipes": _Command(
        "aen_lightning.cli.recipes:recipes_command", "list the recipes, or show one: aen recipes [list | show NAME]"
    ),
    "demo": _Command(
        "aen_lightning.cli.demo:main", "AEN beside L1 and TopK on synthetic data, in minutes and without downloads"
    ),
    "saelens": _Command(
        "aen_lightning.cli.saelens:saelens_command", "SAELens's own training command, with --architecture aen"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``aen COMMAND ...`` and return the exit code.

    Errors of use (a misspelt key, a hook that does not exist, a file that is missing) end with one line and code 2; set
    ``AEN_DEBUG=1`` to see where they were raised.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if args[0] == "--version":
        print(f"aen-lightning {__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        print(f"aen: error: no command {name!r}{suggest(name, COMMANDS)}\n\n{_usage()}", file=sys.stderr)
        return 2
    allocator.keep_freed_memory()
    module_name, _, function_name = COMMANDS[name].target.partition(":")
    command = getattr(importlib.import_module(module_name), function_name)
    try:
        return int(command([name, *rest] if name in _TRAINING else rest) or 0)
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("AEN_DEBUG") or getattr(error, "aen_work_begun", False):
            raise
        print(f"aen {name}: error: {error}\n(AEN_DEBUG=1 shows where this was raised)", file=sys.stderr)
        return 2


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: aen COMMAND [options]",
            "",
            "Adaptive elastic net SAEs for SAELens, trained with PyTorch Lightning.",
            "",
            "commands:",
            *lines,
            "",
            "`aen COMMAND --help` says more; `aen fit --help` lists every setting.",
        ]
    )
