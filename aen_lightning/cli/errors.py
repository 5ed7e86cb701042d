"""One line for every slip.

What jsonargparse, Lightning and our own checks say of it, in the words of the command line.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from textwrap import dedent, shorten

from jsonargparse import ArgumentParser

from aen_lightning.spelling import nearest, printable, suggest


class UsageError(ValueError):
    """What the user can mend.

    A misspelt key, a file that is missing. ``aen`` shows its one line and ends with code 2.
    """


def one_line(text: object) -> str:
    """The text with every run of white space, line breaks too, as one space, and nothing a terminal obeys."""
    return " ".join(printable(str(text)).split())


def explain(message: str, options: Iterable[str]) -> str:
    """What a jsonargparse error message says, in one line, with the nearest name for a misspelt one.

    Args:
        message: jsonargparse's own, of any number of lines.
        options: Every option of the parser, as ``trainer.max_steps``.
    """
    options = list(options)
    if m := re.match(r"unrecognized arguments: (\S+)", message):
        word = m[1].partition("=")[0]
        if not word.startswith("-"):
            return f"unexpected argument {m[1]!r}"
        return f"no option {word}{_nearest_option(word.lstrip('-'), options, prefix='--')}"
    if m := re.match(r"(?:Subcommand '\w+'|Group '([^']+)') does not accept option '([^']+)'", message):
        return _unknown_key(f"{m[1]}.{m[2]}" if m[1] else m[2], options)
    if m := re.match(r"Option '([^']+)' is not accepted", message):
        return _unknown_key(m[1], options)
    if m := re.match(r"the following arguments are required: (.+)", message):
        names = [re.sub(r"^(fit|validate|test)\.", "", name) for name in m[1].split(", ")]
        return f"missing {', '.join(names)}"
    if m := re.match(r"argument (?:-\w/)?(-[\w.+-]+)(?:/\S+)?: (.+)", message, re.DOTALL):
        return f"{m[1]}: {one_line(m[2])}"
    return _explain_value(message)


def _unknown_key(key: str, options: list[str]) -> str:
    """Of a key in a file: the message names the whole path, of which the first part may be the wrong one."""
    root = key.partition(".")[0]
    roots = {option.partition(".")[0] for option in options}
    if root not in roots:
        return f"no section {root!r} in the config{suggest(root, roots)}"
    return f"no key {key!r} in the config{_nearest_option(key, options)}"


def _nearest_option(word: str, options: list[str], *, prefix: str = "") -> str:
    """The option with the same last part, for those who left out its section; else the most similar one."""
    same = [option for option in options if "." in option and option.rpartition(".")[2] == word]
    near = same[0] if same else nearest(word, options)
    return f" (did you mean {prefix + near!r}?)" if near else ""


def _explain_value(text: str) -> str:
    text = dedent(text).strip()
    if m := re.match(r'Parser key "(.+?)"( element \d+)?:\n(.+)', text, re.DOTALL):
        # a key that another one is filled from is not asked for as missing, but found to be None
        is_missing = re.fullmatch(r"\s*Expected an? .+\. Got value: None", m[3])
        return f"missing {m[1]}" if is_missing else f"{m[1]}: {_explain_value(m[3])}"
    if m := re.match(r"Problem with given class_path '([^']+)':\n?(.+)", text, re.DOTALL):
        return _explain_class(m[1], dedent(m[2]).strip())
    if "Does not validate against any of the Union subtypes" in text:
        return _explain_union(text)
    if m := re.match(r"Expected an? (.+)\. Got value: (.*)", text, re.DOTALL):
        wanted, value = _type_name(m[1]), one_line(m[2])
        return f"expected {wanted}, got {shorten(value, 80)!r}{suggest(value, _quoted(wanted))}"
    return one_line(text)


def _explain_class(class_path: str, reason: str) -> str:
    name = class_path.rpartition(".")[2]
    if m := re.match(r"(?:Option|Key) '([^']+)' is not accepted", reason):
        return f"{name} has no option {m[1]!r}{suggest(m[1], _parameters(class_path))}"
    if m := re.match(r"the following arguments are required: (.+)", reason):
        return f"{name} lacks {m[1]}"
    if reason.startswith("Parser key"):
        return f"{name}.{_explain_value(reason)}"
    if _resolve(class_path) is None:
        return f"no class {class_path!r}: {one_line(reason)}"
    return f"{name}: {_explain_value(reason)}"


def _explain_union(text: str) -> str:
    """What the member of the union says that was meant.

    The class if one was given, else all that may stand here.
    """
    members = list(_bullets(text))
    value = one_line(m[1]) if (m := re.search(r"^Given value: (.*)", text, re.MULTILINE)) else ""
    if any("Expected a dot import path string" in m for m in members):
        types = m[1] if (m := re.search(r"^\s*Subtypes: \[(.*)\]$", text, re.MULTILINE)) else ""
        return f"no class {value!r}{suggest(value, _subclasses(types))}"
    if meant := next((m for m in members if not m.startswith("Expected")), None):
        was_word = "Given value type: <class 'str'>" in text and value not in meant
        return _explain_value(meant) + (f", got {value!r}" if was_word else "")
    wanted = " or ".join(
        dict.fromkeys(_type_name(m.removeprefix("Expected a ").partition(". Got")[0]) for m in members)
    )
    return f"expected {wanted}, got {shorten(value, 80)!r}{suggest(value, _quoted(wanted))}"


def _bullets(text: str) -> Iterator[str]:
    """The outermost points of the list under ``Errors:``."""
    lines = text.split("Errors:\n", 1)[-1].splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    point: list[str] = []
    for line in [*lines, ""]:
        outside = len(line) - len(line.lstrip()) < indent
        if (outside or line[indent:].startswith("- ")) and point:
            yield dedent(
                "\n".join([point[0][indent + 2 :], *(more[indent + 2 :] for more in point[1:])])
            ).strip()
            point = []
        if outside:
            return
        point.append(line)


def _type_name(text: str) -> str:
    """``<class 'int'>`` as ``int``, ``typing.Literal['a', 'b']`` as ``'a' or 'b'``."""
    text = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    text = re.sub(r"(?:typing\.)?Literal\[([^\]]*)\]", lambda m: m[1].replace(", ", " or "), text)
    text = re.sub(r"\bbool\b", "true or false", text)
    return one_line(text.replace("NoneType", "null").replace("typing.", ""))


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']+)'", text)


def _resolve(class_path: str) -> type | None:
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None  # the class does not exist: that is what is being explained


def _parameters(class_path: str) -> list[str]:
    """Also those that its constructor passes on to another's."""
    if (cls := _resolve(class_path)) is None:
        return []
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False)
    return list(parser.get_defaults().keys())


def _subclasses(types: str) -> list[str]:
    """Names of the known subclasses of the classes that jsonargparse lists."""
    found: dict[str, None] = {}
    waiting = [cls for path in re.findall(r"[\w.]+\.\w+", types) if isinstance(cls := _resolve(path), type)]
    while waiting:
        cls = waiting.pop()
        found |= {cls.__name__: None}
        waiting += type.__subclasses__(cls)
    return list(found)
