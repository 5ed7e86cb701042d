"""What the documentation shows is run: commands are parsed by the real parsers, Python blocks executed, links followed.

Pages in ``RUN`` are executed whole, block after block, as a reader would. A comment before a block says why one is not:
``<!-- parsed only: why -->`` for commands, ``<!-- not run: why -->`` for Python.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import itertools
import logging
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from aen_lightning.cli.main import COMMANDS, main
from aen_lightning.cli.recipes import recipes

pytestmark = pytest.mark.timeout(900)  # the first to come imports everything

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in DOCS.rglob("*.md"))]
TUTORIALS = [f"docs/tutorials/{name}.md" for name in ("own-model", "look", "sweep", "harvest", "publish")]
RUN = [["README.md"], ["docs/quickstart.md"], TUTORIALS]


class Block(NamedTuple):
    """A fenced block: its language, its text, and why it is not run."""

    language: str
    text: str
    why_not_run: str


def blocks(page: str, *languages: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    pattern = r"(?:<!-- (?:parsed only|not run): (.+?) -->\n)?^ *```(\w+)\n(.*?)^ *```"
    found = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    return [Block(language, body, why) for why, language, body in found if language in languages]


def commands(block: Block) -> list[list[str]]:
    """The words after ``aen`` of every command of ours in a block, whatever starts it (torchrun, srun)."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["aen"]:
            found.append(words[1:])
        elif "aen_lightning" in words and words[words.index("aen_lightning") - 1] == "-m":
            found.append(words[words.index("aen_lightning") + 1 :])
    return found


SHOWN = [(page, words) for page in PAGES for block in blocks(page, "sh", "bash") for words in commands(block)]


def lightning_command(words: list[str]) -> bool:
    return words[0] in COMMANDS and COMMANDS[words[0]].parser == "lightning" and words[0] != "plan"


# commands that differ in nothing a parser could see are parsed once
UNIQUE = {" ".join(words): (page, words) for page, words in SHOWN}


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["aen"])
    monkeypatch.setattr(
        logging, "raiseExceptions", False
    )  # Lightning's handler may hold a stream of pytest's
    return tmp_path


@pytest.mark.parametrize(("page", "words"), UNIQUE.values(), ids=UNIQUE)
def test_commands_pass_their_parser(
    page: str,
    words: list[str],
    in_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--help" in words or "--help_all" in words or words == ["--version"]:
        return
    for name, recipe in (("mine.yaml", "smollm2-135m"), ("runs/mine/version_0/config.yaml", "smollm2-135m")):
        if name in words:  # files that the page has made before
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(recipes()[recipe].read_text())
    if "--ckpt_path" in words:
        words = [*words[: words.index("--ckpt_path")], *words[words.index("--ckpt_path") + 2 :]]
    if lightning_command(words):
        with pytest.raises(SystemExit) as exited:
            main([*words, "--print_config"])
        assert exited.value.code == 0, capsys.readouterr().err
        return
    command = next(name for n in (2, 1) if (name := " ".join(words[:n])) in COMMANDS or words == ["recipes"])
    if words == ["recipes"] or COMMANDS[command].parser != "signature":
        assert main(words) == 0, capsys.readouterr().err
        return
    module_name, _, function_name = COMMANDS[command].target.partition(":")
    module = importlib.import_module(f"aen_lightning.cli.{module_name}")
    called = []
    stub = functools.wraps(getattr(module, function_name))(lambda **values: called.append(values))
    monkeypatch.setattr(module, function_name, stub)
    assert main(words) == 0, capsys.readouterr().err
    assert called


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_compile_and_import(page: str) -> None:
    for block in blocks(page, "python"):
        tree = ast.parse(block.text, page)
        compile(tree, page, "exec")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                ("aen_lightning", "sae_lens")
            ):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.slow
@pytest.mark.filterwarnings("default:::aen_lightning")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("pages", RUN, ids=lambda pages: Path(pages[0]).stem)
def test_pages_run_from_top_to_bottom(
    pages: list[str], in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for page in pages:
        names: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks(page, "python", "sh"):
            if block.why_not_run:
                continue
            if block.language == "python":
                exec(compile(block.text, page, "exec"), names)
                continue
            for words in commands(block):
                quick = ["--trainer.enable_progress_bar=false"] if words[0] in ("fit", "sweep") else []
                with contextlib.suppress(SystemExit):
                    assert main([*words, *quick]) == 0, (
                        f"{page}: aen {' '.join(words)}\n{capsys.readouterr().err}"
                    )


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.startswith("docs/") and p not in (*TUTORIALS, "docs/quickstart.md")]
)
def test_python_blocks_of_other_pages_run(page: str, in_tmp: Path) -> None:
    for block in blocks(page, "python"):
        if not block.why_not_run:
            exec(compile(block.text, page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES)
def test_yaml_blocks_are_yaml(page: str) -> None:
    for block in blocks(page, "yaml"):
        for class_path in re.findall(r"class_path: ([\w.]+)", yaml.safe_dump(yaml.safe_load(block.text))):
            module, _, name = class_path.rpartition(".")
            assert hasattr(importlib.import_module(module), name), f"{page} names {class_path}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_every_page_is_in_the_navigation_and_in_the_map_for_agents() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w/-]+\.md", yaml.safe_dump(config["nav"])))
    assert {f"docs/{page}" for page in listed} == {page for page in PAGES if page.startswith("docs/")}
    for target in re.findall(r"\]\(([\w/-]+)/\)", (DOCS / "llms.txt").read_text()):
        assert any((DOCS / f"{target}{end}").exists() for end in (".md", "/index.md")), target


def test_recipes_named_in_the_text_exist() -> None:
    for page, words in SHOWN:
        for option, value in itertools.pairwise(words):
            if option == "--config":
                assert value in recipes() or value.endswith(".yaml"), f"{page} names the recipe {value}"


def test_pictures_are_shown_and_have_words() -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    for picture in (DOCS / "images").glob("*.svg"):
        shown = re.findall(rf"!\[(.*?)\]\([^)]*{picture.name}\)", text)
        assert shown, f"{picture.name} is shown on no page"
        assert all(len(words.split()) > 3 for words in shown), f"{picture.name} has no words to be read aloud"


def test_colab_badges_lead_to_the_notebook_as_soon_as_the_repository_has_an_address() -> None:
    address = re.search(
        r'^Repository = "(?:https://github\.com/)?(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M
    )
    colab = "https://colab.research.google.com/github/"
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        expected = f"{colab}{address[1]}/blob/main/notebooks/{notebook.name}" if address else colab
        assert re.findall(rf"\]\(({re.escape(colab)}.*?)\)", notebook.read_text()) == [expected]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 900


def test_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # what runs above runs for a reader without a network, too
