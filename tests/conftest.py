from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import aen_lightning  # noqa: F401  # registers the architecture for every test

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")


@pytest.fixture(autouse=True)
def _same_environment_after_each_test() -> Iterator[None]:
    """Lightning's launchers leave ranks and addresses in the environment, which would mislead the next test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
