"""Finds the recipes that ship with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from aen_lightning.config import suggest


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
