"""Fills the pages that are made from the code: the commands, the recipes and the wrong inputs.

A page says ``<!-- generated: NAME -->`` where its part goes; MkDocs calls the functions that begin with ``on_``.
Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aen_lightning.cli.main import COMMANDS, main
from aen_lightning.cli.recipes import recipes, summary

ROOT = Path(__file__).parents[1]
_MARK = re.compile(r"<!-- generated: (\w+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put each generated part in its place."""
    return _MARK.sub(lambda mark: PARTS[mark[1]](), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Take reStructuredText's roles out of what docstrings say: ``:class:`X``` is code like any other."""
    html = re.sub(r":(?:class|func|meth|mod|attr|data|math):(?=<code)", "", html)
    html = re.sub(r"<code>~?((?:\w+\.)+)(\w+)</code>(?=[^<]*)", _last_name, html)
    html = re.sub(r"<code>(\\?[^<]*\\(?:mathrm|epsilon|gamma|phi|theta|bar|tau)[^<]*)</code>", _plain_math, html)
    return html.replace("::</p>", ":</p>")


def _last_name(match: re.Match[str]) -> str:
    # a path into this package is written as its last name; any other dotted name stays
    return f"<code>{match[2]}</code>" if match[1].startswith("aen_lightning.") else match[0]


_GREEK = {"epsilon": "ε", "gamma": "γ", "phi": "φ", "theta": "θ", "tau": "τ"}


def _plain_math(match: re.Match[str]) -> str:
    text = re.sub(r"\\(?:mathrm|bar)\s?\{?(\w+)\}?", r"\1", match[1])
    for name, letter in _GREEK.items():
        text = text.replace(f"\\{name}", letter)
    return f"<code>{text.replace(chr(92), '')}</code>"


def commands() -> str:
    """The help of every command, as ``aen COMMAND --help`` prints it."""
    parts = []
    for name, command in COMMANDS.items():
        text = f"aen {name} --architecture aen --d_in 512 --d_sae 4096 ...   (SAELens's own options)"
        if command.parser != "none":
            text = _help_of(name)
        title = f"{command.help[0].upper()}{command.help[1:]}"
        parts.append(f"## `aen {name}`\n\n{title}.\n\n```text\n{text.strip()}\n```\n")
    return "\n".join(parts)


def _help_of(command: str) -> str:
    os.environ["COLUMNS"] = "100"
    printed = io.StringIO()
    # a plain command's parser exits after its help, the others return
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return printed.getvalue()


def recipe_pages() -> str:
    """Every recipe: what it is, how it is run, and its text."""
    parts = []
    for name, path in recipes().items():
        text = path.read_text(encoding="utf-8")
        run = re.search(r"^#\s+((?:aen|torchrun) .*)$", text, re.MULTILINE)
        command = f"```sh\n{run[1]}\n```\n\n" if run else ""
        body = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
        parts.append(
            f"## `{name}`\n\n{summary(path)}.\n\n{command}"
            f'??? note "The file"\n\n    ```yaml\n{body}\n    ```\n'
        )
    return "\n".join(parts)


def wrong_inputs() -> str:
    """The table of wrong inputs that the tests hold the command line to."""
    table = (ROOT / "tests/cli/wrong_inputs.txt").read_text(encoding="utf-8")
    parts = []
    for section in re.split(r"^# ", table, flags=re.MULTILINE)[1:]:
        title, _, rest = section.partition("\n")
        cases = re.findall(r"^(\$ .*\n.*)$", rest, re.MULTILINE)
        parts.append(f'??? note "{title} ({len(cases)})"\n\n    ```console\n')
        parts[-1] += "\n\n".join("    " + case.replace("\n", "\n    ") for case in cases) + "\n    ```\n"
    return "\n".join(parts)


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "recipes": recipe_pages,
    "wrong_inputs": wrong_inputs,
}
