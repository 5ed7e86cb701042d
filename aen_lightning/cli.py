"""The ``aen`` command."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from aen_lightning import allocator

_TRAINING = ("fit", "validate", "test")


class _Command(NamedTuple):
    target: str  # module:function, imported when called
    help: str


COMMANDS = {
    "fit": _Command("aen_lightning.training_cli:run", "train an SAE: --config FILE_OR_RECIPE"),
    "validate": _Command(
        "aen_lightning.training_cli:run", "metrics on the validation split: --config ... --ckpt_path ..."
    ),
    "test": _Command("aen_lightning.training_cli:run", "metrics on the test split: --config ... --ckpt_path ..."),
    "sweep": _Command(
        "aen_lightning.sweep:sweep_command", "train a grid of SAEs on one stream and compare them: --config ..."
    ),
    "refit": _Command(
        "aen_lightning.refit:refit_command",
        "restore the magnitudes an L1 penalty shrank, L0 unchanged: --model.dictionary ...",
    ),
    "harvest": _Command(
        "aen_lightning.data_cli:harvest_command",
        "write a language model's activations to disk: --config FILE_OR_RECIPE",
    ),
    "shards": _Command("aen_lightning.data_cli:shards_command", "verify, describe or convert activations on disk"),
    "plan": _Command(
        "aen_lightning.data_cli:plan_command", "what a recipe takes: memory, disk, FLOPs, time; runs nothing"
    ),
    "evaluate": _Command(
        "aen_lightning.evaluate:evaluate_command", "a dictionary's metrics on held-out text or shards"
    ),
    "diagnose": _Command(
        "aen_lightning.diagnostics:diagnose_command", "a dictionary's geometry, stability and coding gap"
    ),
    "compare": _Command("aen_lightning.diagnostics:compare_command", "which features several dictionaries share"),
    "report": _Command(
        "aen_lightning.report.commands:report_command", "one self-contained HTML page about one or several runs"
    ),
    "push": _Command("aen_lightning.hub.commands:push_command", "publish a run's dictionaries on the Hugging Face Hub"),
    "pull": _Command("aen_lightning.hub.commands:pull_command", "list a Hub repo's dictionaries, or fetch one"),
    "import": _Command(
        "aen_lightning.hub.commands:import_command", "make SAELens dictionaries of the paper authors' checkpoints"
    ),
    "recipes": _Command(
        "aen_lightning.cli:recipes_command", "list the recipes, or show one: aen recipes [list | show NAME]"
    ),
    "demo": _Command(
        "aen_lightning.demo:main", "AEN beside L1 and TopK on synthetic data, in minutes and without downloads"
    ),
    "saelens": _Command("aen_lightning.cli:saelens_command", "SAELens's own training command, with --architecture aen"),
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
        from aen_lightning import __version__

        print(f"aen-lightning {__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        from aen_lightning.config import suggest

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


def recipes_command(args: Sequence[str]) -> int:
    """``aen recipes [list | show NAME]``."""
    from aen_lightning.recipes_index import find_config, recipes, summary

    if list(args) in (["-h"], ["--help"]):
        print(
            "usage: aen recipes [list]        the recipes, a line each\n       aen recipes show NAME    one recipe's text"
        )
        return 0
    if not args or list(args) == ["list"]:
        known = recipes()
        width = max(map(len, known))
        for name, path in known.items():
            print(f"{name:<{width}}  {summary(path)}")
        return 0
    if len(args) == 2 and args[0] == "show":
        print(find_config(args[1]).read_text(encoding="utf-8"), end="")
        return 0
    raise ValueError(f"expected 'aen recipes [list]' or 'aen recipes show NAME', got {' '.join(args)!r}")


def saelens_command(args: Sequence[str]) -> int:
    """SAELens's training command, in a process where ``aen`` is registered."""
    import aen_lightning  # noqa: F401  # registers the architecture

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
    return 0


if __name__ == "__main__":
    sys.exit(main())
