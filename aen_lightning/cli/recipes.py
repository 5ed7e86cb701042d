"""The recipes that ship with the package, and ``aen recipes list|show|copy``."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from aen_lightning.cli.output import answer
from aen_lightning.spelling import suggest


def recipes() -> dict[str, Path]:
    """Name (without ``.yaml``) and file of every recipe that ships with the package, by name."""
    folder = Path(str(resources.files("aen_lightning") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file that ``--config NAME`` means: a file, or else a recipe by its name or as
    ``recipes/NAME.yaml``.

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
    raise FileNotFoundError(
        f"no config file or recipe {name!r}{suggest(stem, known) or '; recipes: ' + ', '.join(known)}"
    )


def summary(path: Path) -> str:
    """A recipe's first comment line."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip()


def list_() -> None:
    """List the recipes, a line each."""
    known = {name: summary(path) for name, path in recipes().items()}
    width = max(map(len, known))
    answer(known, lambda: "\n".join(f"{name:<{width}}  {text}" for name, text in known.items()))


def show(name: str) -> None:
    """Print a recipe.

    Args:
        name: As `aen recipes list` has it.
    """
    print(find_config(name).read_text(encoding="utf-8"), end="")


def copy(name: str, file: str | None = None) -> None:
    """Copy a recipe to a file of your own, to be edited.

    Args:
        name: As `aen recipes list` has it.
        file: Where to; must not exist. null: NAME.yaml in this folder.
    """
    source = find_config(name)
    target = Path(file or source.name)
    if target.exists():
        raise FileExistsError(f"{target} exists already: give another FILE")
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    print(target)
