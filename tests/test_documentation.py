"""What the documentation shows is run: every Python block compiles, README's are executed, links and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aen_lightning.cli.main import COMMANDS
from aen_lightning.cli.recipes import recipes

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "docs/guide.md", "docs/results.md", "docs/experiments.md"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_compile(page: str):
    for block in blocks(page, "python"):
        compile(block, page, "exec")


def test_readme_trains_and_loads_a_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    train, load = blocks("README.md", "python")
    names: dict[str, object] = {}
    exec(train, names)
    made = next(tmp_path.rglob("sae/final"))
    (tmp_path / "runs/debug/version_0/sae").mkdir(parents=True)
    made.rename(tmp_path / "runs/debug/version_0/sae/final")
    exec(load, names)
    assert names["sae"].cfg.d_sae == 64  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_recipes_exist(page: str):
    known = {name.split()[0] for name in COMMANDS}
    for block in blocks(page, "sh"):
        for command in re.findall(r"^aen (\w+)", block, re.MULTILINE):
            assert command in known, f"{page} shows `aen {command}`"
        for recipe in re.findall(r"--config ([\w.-]+)(?=\s|$)", block, re.MULTILINE):
            assert recipe in recipes() or "/" in recipe, f"{page} names the recipe {recipe}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 900
