"""A tiny language model and rows of its tokens, made once a process and only read."""

from __future__ import annotations

import pytest
import torch

from tests.support.evaluation import CONTEXT
from tests.support.tiny_models import EOS, save_tiny_model


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def rows() -> list[list[int]]:
    """24 rows of token ids, with an EOS somewhere in most."""
    tokens = torch.randint(4, 64, (24, CONTEXT), generator=torch.Generator().manual_seed(0))
    tokens[torch.arange(20), torch.arange(20) % CONTEXT] = EOS
    return tokens.tolist()
