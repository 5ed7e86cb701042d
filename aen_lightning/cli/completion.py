"""``aen completion``: a script that lets the shell complete commands, options, recipes and files.

It is made of the help pages, so it names what they name, and answers without starting Python.
"""

from __future__ import annotations

import re
from typing import Literal

_BASH = """\
# bash completion of aen; in ~/.bashrc:  eval "$(aen completion bash)"
_aen() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words=
    COMPREPLY=()
    if [[ $before == --config || $before == -c ]]; then
        COMPREPLY=($(compgen -W "@RECIPES@" -- "$word") $(compgen -f -- "$word"))
        return
    fi
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "@FIRST@ --help --version" -- "$word"))
        return
    fi
    case "${COMP_WORDS[1]} ${COMP_WORDS[2]}" in
@CASES@
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$words --help" -- "$word"))
    else
        [[ $words == -* ]] && words=
        COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -f -- "$word"))
    fi
}
complete -o filenames -F _aen aen
"""
_ZSH = '# zsh completion of aen; in ~/.zshrc:  eval "$(aen completion zsh)"\nautoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n'


def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print a script that teaches the shell to complete `aen`.

    For bash, put eval "$(aen completion bash)" into ~/.bashrc; for zsh, the like into ~/.zshrc; for fish, aen
    completion fish | source into config.fish.

    Args:
        shell: Which shell.
    """
    print(script(shell), end="")


def script(shell: str) -> str:
    """The script for a shell."""
    from aen_lightning.cli.recipes import recipes

    options = {name: " ".join(words) for name, words in options_of_commands().items()}
    if shell == "fish":
        return _fish(options, sorted(recipes()))
    groups = {name.split()[0] for name in options if " " in name}
    cases = [f'        "{name}"*) words="{words}" ;;' for name, words in options.items() if " " in name]
    for group in sorted(groups):
        members = [name.split()[1] for name in options if name.startswith(f"{group} ")]
        cases.append(f'        "{group} "*) words="{" ".join(members)}" ;;')
    cases += [f'        "{name} "*) words="{words}" ;;' for name, words in options.items() if " " not in name]
    bash = _BASH.replace("@CASES@", "\n".join(cases)).replace("@RECIPES@", " ".join(recipes()))
    bash = bash.replace("@FIRST@", " ".join(dict.fromkeys(name.split()[0] for name in options)))
    return _ZSH + bash.partition("\n")[2] if shell == "zsh" else bash


def _fish(options: dict[str, str], recipes: list[str]) -> str:
    from aen_lightning.cli.main import COMMANDS

    lines = ["# fish completion of aen; in config.fish:  aen completion fish | source"]
    for name, words in options.items():
        first, _, second = name.partition(" ")
        if second:
            lines.append(f"complete -c aen -n __fish_use_subcommand -a {first}")
            only = f"'__fish_seen_subcommand_from {first}; and not __fish_seen_subcommand_from {second}'"
            lines.append(f"complete -c aen -n {only} -a {second}")
        else:
            text = COMMANDS[name].help.replace("'", "\\'")
            lines.append(f"complete -c aen -n __fish_use_subcommand -a {first} -d '{text}'")
        seen = f"'__fish_seen_subcommand_from {first}{f'; and __fish_seen_subcommand_from {second}' if second else ''}'"
        for word in words.split():
            extra = f" -r -a '{' '.join(recipes)}'" if word == "--config" else ""
            lines.append(f"complete -c aen -n {seen} -l {word.removeprefix('--')}{extra}")
    return "\n".join(dict.fromkeys(lines)) + "\n"


def options_of_commands() -> dict[str, list[str]]:
    """By command, the options that its help page names, in full."""
    from aen_lightning.cli.main import COMMANDS, help_page

    return {
        name: _options_on(help_page(name)) if command.parser != "none" else []
        for name, command in COMMANDS.items()
    }


def _options_on(page: str) -> list[str]:
    """Options in the left column: full ones, and those of a section whose title says ``--model.KEY``."""
    found, prefix, in_title = [], "", False
    for line in page.splitlines():
        if re.match(r"\S", line):
            if m := re.search(r"(--[\w.]+\.)KEY", line):
                prefix = m[1]
            elif not in_title:
                prefix = ""
            in_title = not line.rstrip().endswith(":")  # on a narrow terminal a title takes two lines
            continue
        in_title = False
        if m := re.match(r"  (--[\w.-]+)", line):
            found.append(m[1])
        elif prefix and (m := re.match(r"  ([a-z_]\w*)", line)):
            found.append(prefix + m[1])
    return found
