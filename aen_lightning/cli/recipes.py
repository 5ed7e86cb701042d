"""The recipes that ship with the package, and ``aen recipes``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from aen_lightning.spelling import suggest


def recipes() -> dict[str, Path]:
    """Name (without ``.yaml``) and file of every recipe that ships with the package, by name."""
    folder = Path(str(resources.files("aen_lightning") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file that ``--config NAME`` means: a file, or else a recipe by its name or as ``recipes/NAME.yaml``.

    Raises:
        FileNotFoundError: If it is neither; the message lists the recipes.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = recipes()
    stem = path.name.removesuffix(".yaml")
    if stem in known and path.parent in (Path(), Path("recipes")):
        return known[stem]
    raise FileNotFoundError(f"no config file or recipe {name!r}{suggest(stem, known)}; recipes: {', '.join(known)}")


def summary(path: Path) -> str:
    """A recipe's first comment line."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip()


def recipes_command(args: Sequence[str]) -> int:
    """``aen recipes [list | show NAME]``."""
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
