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


def run_function(function: Callable[..., None], args: Sequence[str], *, prog: str) -> None:
    """Parse the arguments of a command and call its function with them.

    Raises:
        UsageError: For arguments that do not fit the signature, and where the function raises ValueError,
            TypeError or OSError: the same error in one line.
    """
    parser = make_parser(function, prog)
    values = parser.parse_args(normalized(args, _flags(function))).as_dict()
    for name, hint in _hints(function).items():
        if dataclasses.is_dataclass(hint):
            values[name] = hint(**{f.name: values.pop(f.name) for f in dataclasses.fields(hint)})  # type: ignore[operator]
    try:
        function(**values)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error


def make_parser(function: Callable[..., None], prog: str) -> CommandParser:
    """The parser of a command; ``prog`` is how it is called, as ``aen shards verify``."""
    parser = CommandParser(prog=prog, allow_abbrev=False)
    parser.usage_line, parser.page = _usage_and_help(function, prog)
    _add_arguments(parser, function)
    for hint in _hints(function).values():
        if dataclasses.is_dataclass(hint):
            _add_arguments(parser, hint)
    return parser


def _usage_and_help(function: Callable[..., None], prog: str) -> tuple[str, str]:
    hints, parameters = _hints(function), inspect.signature(function).parameters
    groups = [hint for hint in hints.values() if dataclasses.is_dataclass(hint)]
    words, positionals, options = [prog], [], []
    for option in options_of(function):
        if _is_positional(parameters[option.name]):
            word = option.name.upper() + ("..." if _element(hints[option.name]) else "")
            words.append(word if option.default is None else f"[{word}]")
            positionals.append(dataclasses.replace(option, name=word, type=""))
        elif hints[option.name] not in groups:
            options.append(_dashed(option))
    usage = " ".join([*words, "[options]"] if options or groups else words)
    sections = [("", positionals), ("[value]: default. A flag is --FLAG or --no_FLAG.", options)]
    sections += [
        (_docs(group).short_description or "", [_dashed(o) for o in options_of(group)]) for group in groups
    ]
    text = page(
        usage, plain(_docs(function).description or ""), [section for section in sections if section[1]]
    )
    return usage, text


def _docs(source: Any) -> docstring_parser.Docstring:
    return docstring_parser.parse(source.__doc__ or "")


def _dashed(option: Option) -> Option:
    return dataclasses.replace(option, name=f"--{option.name}")


def _is_positional(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def _add_arguments(parser: CommandParser, source: Any) -> None:
    """All parameters of a function, or fields of a dataclass."""
    hints, of_function = _hints(source), not isinstance(source, type)
    own: dict[
        str, inspect.Parameter
    ] = {}  # what jsonargparse does not take as words: lists, positionals with a default
    for name, p in inspect.signature(source).parameters.items():
        optional_positional = of_function and _is_positional(p) and p.default is not p.empty
        if dataclasses.is_dataclass(hints[name]) or _element(hints[name]) or optional_positional:
            own[name] = p
    if of_function:
        parser.add_function_arguments(source, as_group=False, as_positional=True, skip=set(own))
    else:
        parser.add_class_arguments(source, as_group=False, skip=set(own))
    for name, p in own.items():
        element = _element(hints[name])
        if dataclasses.is_dataclass(hints[name]):
            continue
        if not (of_function and _is_positional(p)):
            parser.add_argument(f"--{name}", type=element, nargs="+", default=p.default)
        elif p.default is p.empty:
            parser.add_argument(name, type=element, nargs="+")
        else:
            parser.add_argument(
                name, type=element or hints[name], nargs="*" if element else "?", default=p.default
            )


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


def _flags(function: Callable[..., None]) -> set[str]:
    hints = _hints(function)
    for hint in list(hints.values()):
        if dataclasses.is_dataclass(hint):
            hints |= _hints(hint)
    return {name for name, hint in hints.items() if _without_none(hint) is bool}


def _without_none(hint: Any) -> Any:
    """``T`` of ``T | None``; any other hint as it is."""
    rest = [member for member in get_args(hint) if member is not NoneType]
    return rest[0] if get_origin(hint) in (Union, UnionType) and len(rest) == 1 else hint


def _element(hint: Any) -> Any:
    """``T`` of ``list[T]`` and ``list[T] | None``, else None."""
    hint = _without_none(hint)
    return get_args(hint)[0] if get_origin(hint) is list else None
