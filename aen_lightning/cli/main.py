"""The ``aen`` command.

Nothing here imports torch; only the commands that LightningCLI parses need it, to know their options.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

from aen_lightning import __version__
from aen_lightning.cli.errors import UsageError, one_line
from aen_lightning.cli.help import Option
from aen_lightning.cli.output import OPTIONS, spoken
from aen_lightning.cli.parser import make_parser, run_function
from aen_lightning.cli.training_help import sae_help, training_help
from aen_lightning.progress import working
from aen_lightning.spelling import suggest


class Command(NamedTuple):
    """A command.

    ``module:function``, imported when called, what it does, what makes its parser, whether it takes
    ``--json``, and whether it needs no torch.
    """

    target: str
    help: str
    parser: Literal["signature", "lightning", "none"] = "signature"
    json: bool = False
    light: bool = False

    @property
    def common_options(self) -> list[Option]:
        """What it takes besides its own options."""
        options = [Option("--quiet", "bool", "False", "No progress and no remarks.")]
        if self.json:
            what = "The answer as one JSON object; all else goes to standard error."
            options.append(Option("--json", "bool", "False", what))
        return options


def _lightning(target: str, text: str) -> Command:
    return Command(target, text, "lightning", json=True)


COMMANDS = {
    "fit": _lightning("training:fit", "train an SAE: --config FILE_OR_RECIPE"),
    "validate": _lightning("training:fit", "metrics on the validation split: --config ... --ckpt_path ..."),
    "test": _lightning("training:fit", "metrics on the test split: --config ... --ckpt_path ..."),
    "sweep": _lightning("sweep:sweep", "train a grid of SAEs on one stream and compare them: --config ..."),
    "refit": _lightning("refit:refit", "restore the magnitudes an L1 penalty shrank: --model.dictionary ..."),
    "harvest": _lightning("harvest:harvest", "write a language model's activations to disk: --config ..."),
    "plan": _lightning("plan:plan", "what a recipe takes: memory, disk, FLOPs, time; runs nothing"),
    "shards verify": Command("shards:verify", "check activations on disk against their manifest", json=True),
    "shards info": Command("shards:info", "say what a set of activations is", json=True),
    "shards convert": Command("shards:convert", "to SAELens's cached activations, or from them"),
    "evaluate": Command("evaluate:evaluate", "a dictionary's metrics on held-out text or shards", json=True),
    "diagnose": Command("diagnose:diagnose", "a dictionary's geometry, stability and coding gap", json=True),
    "compare": Command("compare:compare", "which features several dictionaries share", json=True),
    "report": Command("report:report", "one self-contained HTML page about one or several runs"),
    "push": Command("hub:push", "publish a run's dictionaries on the Hugging Face Hub"),
    "pull": Command("hub:pull", "list a Hub repo's dictionaries, or fetch one"),
    "import": Command("hub:import_", "make SAELens dictionaries of the paper authors' checkpoints"),
    "recipes list": Command("recipes:list_", "the recipes, a line each", json=True, light=True),
    "recipes show": Command("recipes:show", "print a recipe", light=True),
    "recipes copy": Command("recipes:copy", "copy a recipe to a file of your own", light=True),
    "demo": Command(
        "demo:demo", "AEN beside L1 and TopK on synthetic data, in minutes and without downloads"
    ),
    "completion": Command(
        "completion:completion", "a script for bash, zsh or fish that completes all this", light=True
    ),
    "saelens": Command("saelens:saelens", "SAELens's own training command, with --architecture aen", "none"),
}


_HELP = ("-h", "--help")
_OPTIONS = (*_HELP, "--version")


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a disk, a quota, or a file that is full."""


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
    except OSError as error:
        if error.errno not in _NO_ROOM or os.environ.get("AEN_DEBUG"):
            raise
        print(f"{_name(args)}: error: {one_line(error)}", file=sys.stderr)
        return 1
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
    given: frozenset[str] = frozenset()
    if command.parser != "none":
        given = frozenset(rest) & frozenset(OPTIONS)
        rest = [word for word in rest if word not in given]
    if "--json" in given and not command.json:
        able = ", ".join(name for name, c in COMMANDS.items() if c.json)
        raise UsageError(f"no option --json; it is one of {able}")
    with spoken(given):
        _run_command(name, command, rest)


def _run_command(name: str, command: Command, rest: list[str]) -> None:
    if command.parser == "lightning":
        if page := _short_help(name, rest):
            print(page)
            return
        rest = ["--help" if word in ("--help_all", "--help-all") else word for word in rest]
        _load_libraries()
    function = _function(command)
    if command.parser == "signature":
        prepare = (lambda: None) if command.light else _load_libraries
        run_function(function, rest, prog=f"aen {name}", common=command.common_options, prepare=prepare)
    else:
        function([name, *rest] if command.target == "training:fit" else rest)


def _load_libraries() -> None:
    """Import what takes seconds, and say so meanwhile."""
    with working("loading PyTorch, Lightning and SAELens"):
        importlib.import_module("lightning.pytorch")
        importlib.import_module("sae_lens")


def _function(command: Command) -> Callable[..., None]:
    module, _, name = command.target.partition(":")
    function: Callable[..., None] = getattr(importlib.import_module(f"aen_lightning.cli.{module}"), name)
    return function


def help_page(name: str) -> str:
    """The help page of a command that has one of ours."""
    command = COMMANDS[name]
    if command.parser == "lightning":
        return training_help(name, command.common_options)
    return make_parser(_function(command), f"aen {name}", command.common_options).page


def _short_help(name: str, args: Sequence[str]) -> str | None:
    """The page that ``--help`` or ``--model.sae.help ARCHITECTURE`` asks for."""
    if any(word in args for word in _HELP):
        return help_page(name)
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
            "`aen COMMAND --help` says more; of fit, sweep and the like --help_all shows every option.",
            "Every command takes --quiet (no progress, no remarks); those with an answer that a script may",
            "read take --json (one JSON object on standard output).",
            "",
            "Exit codes: 0 done; 1 failed while it ran; 2 wrong use, said in one line (AEN_DEBUG=1 shows where",
            "it was noticed); 75 stopped by SIGTERM or a scheduler and saved: start it again; 130 interrupted.",
        ]
    )
