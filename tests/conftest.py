from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import aen_lightning  # noqa: F401  # registers the architecture for every test

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that at the end no worker waits for another one's."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _same_environment_after_each_test() -> Iterator[None]:
    """Lightning's launchers leave ranks and addresses in the environment, which would mislead the next test.

    A recipe's `num_threads` holds for the whole process: with several processes on few cores, threads that wait
    for each other made every later test of that process ten times slower.
    """
    before, n_threads = dict(os.environ), torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(before)
    if torch.get_num_threads() != n_threads:
        torch.set_num_threads(n_threads)
