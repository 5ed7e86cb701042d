"""Imports point one way: a room may use those below it, and no other room's private names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import aen_lightning

PACKAGE = Path(aen_lightning.__file__).parent

# from the bottom up; rooms of one line do not know each other
LAYERS = [
    {"spelling"},
    {"files", "retry", "compat", "registration", "device_copies", "progress"},
    {"sparse", "metrics"},
    {"saes"},
    {"shards", "language_model", "sharded"},
    {"data"},
    {"harvest"},
    {"runs"},
    {"evaluate", "hub"},
    {"diagnostics"},
    {"callbacks"},
    {"training"},
    {"presets"},
    {"report"},
    {"cli"},
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
# The package's own door and its command stand above all; what they import is imported when it is used.
OUTSIDE = {"__init__", "__main__"}
# registration names the SAE as a string, to be imported once SAELens is; recipes are data
DATA_ROOMS = {"recipes"}

# callbacks is a link to the folder at the top level, which rglob does not follow
MODULES = sorted(
    path.relative_to(PACKAGE) for path in (*PACKAGE.rglob("*.py"), *(PACKAGE / "callbacks").glob("*.py"))
)


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imports(module: Path) -> list[tuple[int, str, str]]:
    """Line, imported module below the package, and imported name, of everything from this package, also
    inside functions.
    """
    found = []
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively"
            name = node.module or ""
            if name == "aen_lightning":
                found += [(node.lineno, alias.name, alias.name) for alias in node.names]
            elif name.startswith("aen_lightning."):
                found += [
                    (node.lineno, name.removeprefix("aen_lightning."), alias.name) for alias in node.names
                ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("aen_lightning.")]
            found += [(node.lineno, name.removeprefix("aen_lightning."), "") for name in names]
    return found


def test_every_room_has_its_place():
    rooms = {room_of(module) for module in MODULES} - OUTSIDE - DATA_ROOMS
    assert rooms == set(RANK)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_one_way(module: Path):
    here = room_of(module)
    if here in OUTSIDE:
        return
    for line, target, name in imports(module):
        there = target.split(".")[0]
        if there not in RANK:  # `from aen_lightning import __version__`
            assert here == "cli", f"{module}:{line} imports {there} from the package's door"
            continue
        assert there == here or RANK[there] < RANK[here], f"{module}:{line}: {here} may not import {there}"
        private = there != here and any(part.startswith("_") for part in (*target.split("."), name))
        assert not private, f"{module}:{line} reaches for {target}.{name}, which is private to {there}"


def test_library_rooms_know_no_command_line():
    for module in MODULES:
        if room_of(module) in {"cli", *OUTSIDE}:
            continue
        tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            parses = isinstance(node, (ast.Name, ast.Attribute)) and "ArgumentParser" in ast.unparse(node)
            assert not parses, f"{module}:{node.lineno} parses arguments"  # type: ignore[attr-defined]
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            assert called != "print", f"{module}:{node.lineno} prints"  # type: ignore[attr-defined]
