"""Help pages: an option a line, with its type, default and meaning out of signature and docstring.

Classes that import torch are read from their source, so that help needs no import; what the pages say of them
cannot drift.
"""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docstring_parser

_LEFT = 35  # columns for an option with its type and default


@dataclass(frozen=True)
class Option:
    """An option.

    Its name, its type and default as Python writes them (no default: required), and its meaning.
    """

    name: str
    type: str
    default: str | None
    meaning: str

    @property
    def left(self) -> str:
        """``name TYPE [default]``; choices stand with the meaning."""
        words = [self.name]
        if m := re.fullmatch(r"(?:list\[)?(int|float|str|dict)\b(\])?.*?( \| None)?", self.type):
            words.append(m[1].upper() + ("..." if self.type.startswith("list") else ""))
        if self.default not in (None, "None", "()", "False"):
            words.append(f"[{'true' if self.default == 'True' else self.default.strip(chr(39))}]")
        return " ".join(words)

    @property
    def text(self) -> str:
        """The meaning, and the choices where there are some."""
        choices = f" One of {', '.join(self._choices)}." if self._choices else ""
        return f"{'' if self.default is not None else '(required) '}{self.meaning}{choices}".strip()

    @property
    def _choices(self) -> list[str]:
        literal = re.match(r"Literal\[(.*)\]", self.type)
        return [word.strip(" '\"") for word in literal[1].split(",")] if literal else []


def options_of(source: Any) -> list[Option]:
    """The options of a function or dataclass that is there."""
    return [
        Option(
            name,
            annotation(p.annotation),
            None if p.default is p.empty else repr(p.default),
            meaning(source, name),
        )
        for name, p in inspect.signature(source).parameters.items()
    ]


def options_in_source(module: str, class_name: str) -> tuple[str, list[Option]]:
    """What a class of this package is, and the options of its constructor, without importing it.

    Args:
        module: As ``saes.aen_config``.
        class_name: A class there: a dataclass, or one with an ``__init__``.
    """
    path = Path(__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    docs = docstring_parser.parse(ast.get_docstring(cls) or "")
    meanings = {p.arg_name: plain(p.description or "") for p in docs.params}
    found: list[tuple[str, ast.expr | None, ast.expr | None]]
    init = next((n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is None:
        fields = [(n.target, n.annotation, n.value) for n in cls.body if isinstance(n, ast.AnnAssign)]
        found = [(t.id, a, d) for t, a, d in fields if isinstance(t, ast.Name)]
    else:
        args = init.args
        defaults = [None] * (len(args.args) - len(args.defaults)) + list(args.defaults)
        pairs = [*zip(args.args, defaults, strict=True), *zip(args.kwonlyargs, args.kw_defaults, strict=True)]
        found = [(a.arg, a.annotation, d) for a, d in pairs if a.arg != "self"]
    return plain(docs.short_description or ""), [
        Option(name, ast.unparse(a) if a else "", ast.unparse(d) if d else None, meanings.get(name, ""))
        for name, a, d in found
    ]


def page(
    usage: str, description: str, sections: Iterable[tuple[str, Sequence[Option]]], *, one_line: bool = False
) -> str:
    """A help page.

    Args:
        usage: How the command is called.
        description: What it does.
        sections: Title and options of each; an empty title has no line of its own.
        one_line: Whether to say of each option only what fits its line.
    """
    width = max(80, min(shutil.get_terminal_size((110, 24)).columns, 120))
    text = [f"usage: {usage}", "", *textwrap.wrap(description, width)]
    for title, options in sections:
        text += ["", *textwrap.wrap(title, width)]
        for option in options:
            room = width - _LEFT - 3
            meaning = [_brief(option.text, room)] if one_line else textwrap.wrap(option.text, room) or [""]
            left = f"  {option.left}"
            if len(left) > _LEFT + 1:
                text.append(left)
                left = ""
            text += [
                f"{left:<{_LEFT + 2}} {meaning[0]}".rstrip(),
                *(f"{'':<{_LEFT + 3}}{more}" for more in meaning[1:]),
            ]
    return "\n".join(text)


def _brief(text: str, room: int) -> str:
    """As many whole clauses as fit, or else the beginning."""
    if len(text) <= room:
        return text
    ends = [m.start() for m in re.finditer(r"(?<!e\.g)[.;] ", text) if 20 <= m.start() < room]
    return f"{text[: ends[-1]]}." if ends else textwrap.shorten(text, room, placeholder=" ...")


def plain(text: str) -> str:
    """A docstring without its markup, on one line."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?([\w ]+)`", r"\1", text)
    return " ".join(text.replace("``", "").split())


def annotation(hint: Any) -> str:
    """A type as Python writes it."""
    if isinstance(hint, str):
        return hint
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def meaning(source: Any, name: str) -> str:
    """What the docstring of a function or class says of a parameter."""
    params = docstring_parser.parse(source.__doc__ or "").params
    return next((plain(p.description or "") for p in params if p.arg_name == name), "")
