"""Makes a command's parser from the signature and docstring of its function, and calls the function.

A parameter before ``*`` is a positional argument, one after it an option of the same name; a list takes
several words; a flag ``x: bool`` is ``--x`` or ``--no_x``; the fields of a dataclass are options like all
others. jsonargparse does the rest: types, defaults, help.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser

from aen_lightning.cli.errors import UsageError, explain
from aen_lightning.cli.help import Option, options_of, page, plain

_SHORT = {"-o": "--out", "-c": "--config"}


class OneLineErrors:
    """Lets a jsonargparse parser raise :class:`UsageError` with one line, instead of printing its usage and
    exiting.
    """

    usage_line = ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Called by jsonargparse.

        The parsers of nested classes, whose errors it collects itself, keep theirs.
        """
        if not self.exit_on_error:  # type: ignore[attr-defined]
            super().error(message, ex)  # type: ignore[misc]
        line = explain(message, self.option_names(getattr(ex, "subcommand_parser", None) or self))
        if line.startswith(("missing", "unexpected")):
            line += f"; usage: {self.usage_line}"
        raise UsageError(line) from ex

    def option_names(self, parser: Any) -> list[str]:
        """What a misspelt option may have meant."""
        return list(parser.get_defaults().keys())


class CommandParser(OneLineErrors, ArgumentParser):
    """The parser of a command that is a plain function; its help is ours, an option a line."""

    page = ""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """See base class."""
        return self.page + "\n"


def run_function(
    function: Callable[..., None],
    args: Sequence[str],
    *,
    prog: str,
    common: Sequence[Option] = (),
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Parse the arguments of a command and call its function with them.

    Args:
        function: The command.
        args: What was typed after its name.
        prog: How it is called, as ``aen shards verify``.
        common: Options for its help page that are taken care of elsewhere.
        prepare: Called when the arguments are known to fit, before the function.

    Raises:
        UsageError: For arguments that do not fit the signature, and where the function raises ValueError,
            TypeError or OSError: the same error in one line.
    """
    parser = make_parser(function, prog, common)
    values = parser.parse_args(normalized(args, _flags(function))).as_dict()
    for name, group in _groups(function).items():
        values[name] = group(**{f.name: values.pop(f.name) for f in dataclasses.fields(group)})
    prepare()
    try:
        function(**values)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error


def make_parser(function: Callable[..., None], prog: str, common: Sequence[Option] = ()) -> CommandParser:
    """The parser of a command; the arguments are those of :func:`run_function`."""
    parser = CommandParser(prog=prog, allow_abbrev=False)
    parser.usage_line, parser.page = _usage_and_help(function, prog, common)
    for source in (function, *_groups(function).values()):
        _add_arguments(parser, source)
    return parser


def _usage_and_help(function: Callable[..., None], prog: str, common: Sequence[Option]) -> tuple[str, str]:
    hints, groups, parameters = _hints(function), _groups(function), inspect.signature(function).parameters
    words, positionals, options = [prog], [], []
    for option in options_of(function):
        if _is_positional(parameters[option.name]):
            word = option.name.upper() + ("..." if _element(hints[option.name]) else "")
            words.append(word if option.default is None else f"[{word}]")
            positionals.append(dataclasses.replace(option, name=word, type=""))
        elif option.name not in groups:
            options.append(_dashed(option))
    usage = " ".join([*words, "[options]"] if options or groups else words)
    sections = [("", positionals), ("[value]: default. A flag is --FLAG or --no_FLAG.", options)]
    for group in groups.values():
        sections.append((_docs(group).short_description or "", [_dashed(o) for o in options_of(group)]))
    sections.append(("What it says:", list(common)))
    description = plain(_docs(function).description or "")
    return usage, page(usage, description, [section for section in sections if section[1]])


def _docs(source: Any) -> docstring_parser.Docstring:
    return docstring_parser.parse(source.__doc__ or "")


def _dashed(option: Option) -> Option:
    return dataclasses.replace(option, name=f"--{option.name}")


def _is_positional(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def _add_arguments(parser: CommandParser, source: Any) -> None:
    """All parameters of a function but its groups, or fields of a dataclass, which are all options."""
    hints, of_function = _hints(source), not isinstance(source, type)
    own: dict[
        str, inspect.Parameter
    ] = {}  # jsonargparse takes a list as one word, and no positional by default
    for name, p in inspect.signature(source).parameters.items():
        if _element(hints[name]) or (of_function and _is_positional(p) and p.default is not p.empty):
            own[name] = p
    skip: set[str | int] = {*own, *_groups(source)}
    if of_function:
        parser.add_function_arguments(source, as_group=False, as_positional=True, skip=skip)
    else:
        parser.add_class_arguments(source, as_group=False, skip=skip)
    for name, p in own.items():
        element = _element(hints[name])
        if not (of_function and _is_positional(p)):
            parser.add_argument(f"--{name}", type=element, nargs="+", default=p.default)
        elif p.default is p.empty:
            parser.add_argument(name, type=element, nargs="+")
        else:
            nargs = "*" if element else "?"
            parser.add_argument(name, type=element or hints[name], nargs=nargs, default=p.default)


def normalized(args: Sequence[str], flags: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """The arguments in the one spelling that the parsers know: ``--foo_bar``, ``--flag=true``.

    Args:
        args: As typed: ``--foo-bar`` is ``--foo_bar``, and ``-o`` is ``--out``.
        flags: Names of options that may stand without a value, or as ``--no_NAME``.
    """
    done: list[str] = []
    for word, following in zip(args, [*args[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        option = _SHORT.get(option, option)
        if option.startswith("--"):
            option = "--" + option[2:].replace("-", "_")
        name = option[2:]
        if not equals and name in flags and following.lower() not in ("true", "false"):
            equals, value = "=", "true"
        elif not equals and name.startswith("no_") and name[3:] in flags:
            option, equals, value = f"--{name[3:]}", "=", "false"
        done.append(option + equals + value if option.startswith("-") else word)
    return done


def _hints(source: Any) -> dict[str, Any]:
    hints = get_type_hints(source)
    hints.pop("return", None)
    return hints


def _groups(source: Any) -> dict[str, Any]:
    """The parameters that are dataclasses, with their classes."""
    return {name: hint for name, hint in _hints(source).items() if dataclasses.is_dataclass(hint)}


def _flags(function: Callable[..., None]) -> set[str]:
    sources = (function, *_groups(function).values())
    return {
        name for source in sources for name, hint in _hints(source).items() if _without_none(hint) is bool
    }


def _without_none(hint: Any) -> Any:
    """``T`` of ``T | None``; any other hint as it is."""
    rest = [member for member in get_args(hint) if member is not NoneType]
    return rest[0] if get_origin(hint) in (Union, UnionType) and len(rest) == 1 else hint


def _element(hint: Any) -> Any:
    """``T`` of ``list[T]`` and ``list[T] | None``, else None."""
    hint = _without_none(hint)
    return get_args(hint)[0] if get_origin(hint) is list else None
