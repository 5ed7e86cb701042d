"""A tiny language model and documents, made once a process and only read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.support.tiny_models import save_tiny_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def documents() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(4, 64, size=generator.integers(1, 40)).tolist() for _ in range(70)]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> str:
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(f"w{t}" for t in d)}) + "\n" for d in documents))
    return str(path)
