"""The ``aen`` command.

Nothing here imports torch; only the commands that LightningCLI parses need it, to know their options.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from aen_lightning import __version__
from aen_lightning.cli.errors import UsageError, one_line
from aen_lightning.cli.parser import run_function
from aen_lightning.cli.training_help import sae_help, training_help
from aen_lightning.spelling import suggest


class Command(NamedTuple):
    """A command: ``module:function``, imported when called, what it does, and what makes its parser."""

    target: str
    help: str
    parser: Literal["signature", "lightning", "none"] = "signature"


def _lightning(target: str, text: str) -> Command:
    return Command(target, text, "lightning")


COMMANDS = {
    "fit": _lightning("training:fit", "train an SAE: --config FILE_OR_RECIPE"),
    "validate": _lightning("training:fit", "metrics on the validation split: --config ... --ckpt_path ..."),
    "test": _lightning("training:fit", "metrics on the test split: --config ... --ckpt_path ..."),
    "sweep": _lightning("sweep:sweep", "train a grid of SAEs on one stream and compare them: --config ..."),
    "refit": _lightning("refit:refit", "restore the magnitudes an L1 penalty shrank: --model.dictionary ..."),
    "harvest": _lightning("harvest:harvest", "write a language model's activations to disk: --config ..."),
    "plan": _lightning("plan:plan", "what a recipe takes: memory, disk, FLOPs, time; runs nothing"),
    "shards verify": Command("shards:verify", "check activations on disk against their manifest"),
    "shards info": Command("shards:info", "say what a set of activations is"),
    "shards convert": Command("shards:convert", "to SAELens's cached activations, or from them"),
    "evaluate": Command("evaluate:evaluate", "a dictionary's metrics on held-out text or shards"),
    "diagnose": Command("diagnose:diagnose", "a dictionary's geometry, stability and coding gap"),
    "compare": Command("compare:compare", "which features several dictionaries share"),
    "report": Command("report:report", "one self-contained HTML page about one or several runs"),
    "push": Command("hub:push", "publish a run's dictionaries on the Hugging Face Hub"),
    "pull": Command("hub:pull", "list a Hub repo's dictionaries, or fetch one"),
    "import": Command("hub:import_", "make SAELens dictionaries of the paper authors' checkpoints"),
    "recipes list": Command("recipes:list_", "the recipes, a line each"),
    "recipes show": Command("recipes:show", "print a recipe"),
    "recipes copy": Command("recipes:copy", "copy a recipe to a file of your own"),
    "demo": Command(
        "demo:demo", "AEN beside L1 and TopK on synthetic data, in minutes and without downloads"
    ),
    "saelens": Command("saelens:saelens", "SAELens's own training command, with --architecture aen", "none"),
}


_HELP = ("-h", "--help")
_OPTIONS = (*_HELP, "--version")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``aen COMMAND ...`` and return the exit code.

    Wrong use (a misspelt key, a hook that does not exist, a file that is missing) ends with one line and code
    2; set ``AEN_DEBUG=1`` to see where it was noticed.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        run(args)
    except UsageError as error:
        if os.environ.get("AEN_DEBUG"):
            raise
        print(f"{_name(args)}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):  # which Lightning makes an exit with 1 of
            raise
        print(f"{_name(args)}: interrupted", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(f"{_name(args)}: interrupted", file=sys.stderr)
        return 130
    return 0


def run(args: Sequence[str]) -> None:
    """Run ``aen COMMAND ...``, the name of the program left out.

    Raises:
        UsageError: For wrong use, with one line that says what was expected.
    """
    if not args or args[0] in _HELP:
        print(_usage(COMMANDS))
        return
    if args[0] == "--version":
        print(f"aen-lightning {__version__}")
        return
    if (members := _members(args[0])) and args[1:2] and args[1] in _HELP:
        print(_usage(members.values()))
        return
    name, rest = _split(args)
    command = COMMANDS[name]
    if command.parser == "lightning":
        if page := _short_help(name, rest):
            print(page)
            return
        rest = ["--help" if word in ("--help_all", "--help-all") else word for word in rest]
    module, _, function_name = command.target.partition(":")
    function = getattr(importlib.import_module(f"aen_lightning.cli.{module}"), function_name)
    if command.parser == "signature":
        run_function(function, rest, prog=f"aen {name}")
    else:
        function([name, *rest] if command.target == "training:fit" else rest)


def _short_help(name: str, args: Sequence[str]) -> str | None:
    """The page that ``--help`` or ``--model.sae.help ARCHITECTURE`` asks for."""
    if any(word in args for word in _HELP):
        return training_help(name)
    for word, following in zip(args, [*args[1:], ""], strict=False):
        option, _, value = word.partition("=")
        if option == "--model.sae.help":
            return sae_help(value or following or "aen")
    return None


def _split(args: Sequence[str]) -> tuple[str, list[str]]:
    """The command's name, of one word or two, and the rest."""
    first, rest = args[0], list(args[1:])
    if first in COMMANDS:
        return first, rest
    members = _members(first)
    if not members:
        kind = "option" if first.startswith("-") else "command"
        known = _OPTIONS if first.startswith("-") else {name.split()[0] for name in COMMANDS}
        raise UsageError(f"no {kind} {first!r}{suggest(first, known)}")
    if first == "recipes" and not rest:
        return "recipes list", rest
    if not rest:
        raise UsageError(f"{first} what? There are {', '.join(members.values())}")
    if rest[0] not in members:
        near = suggest(rest[0], members) or f"; there are {', '.join(members.values())}"
        raise UsageError(f"no command '{first} {rest[0]}'{near}")
    return members[rest[0]], rest[1:]


def _members(group: str) -> dict[str, str]:
    """The commands of a group such as ``shards``, by their second word."""
    return {name.partition(" ")[2]: name for name in COMMANDS if name.startswith(f"{group} ")}


def _name(args: Sequence[str]) -> str:
    """How the error begins: ``aen``, or ``aen COMMAND``."""
    words = " ".join(args[:2])
    known = words if words in COMMANDS else next(iter(args), "")
    return f"aen {known}" if known in COMMANDS else "aen"


def _usage(names: Iterable[str]) -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {COMMANDS[name].help}" for name in names]
    return "\n".join(
        [
            "usage: aen COMMAND [options]",
            "",
            "Adaptive elastic net SAEs for SAELens, trained with PyTorch Lightning.",
            "",
            "commands:",
            *lines,
            "",
            "`aen COMMAND --help` says more. Exit codes: 0 done; 1 failed while it ran; 2 wrong use, said "
            "in one line",
            "(AEN_DEBUG=1 shows where it was noticed); 75 saved after SIGTERM or a scheduler's signal, start it "
            "again;",
            "130 interrupted, a run that trains is saved.",
        ]
    )
