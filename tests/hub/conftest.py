from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
from huggingface_hub.utils import disable_progress_bars

from tests.support.hub_client import new_cache, use_endpoint
from tests.support.hub_server import TOKEN, HubServer, running_hub


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between attempts, noted instead of waited."""
    noted: list[float] = []
    monkeypatch.setattr(time, "sleep", noted.append)
    return noted


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[HubServer]:
    """A Hub on the loopback, an empty cache, and a login."""
    disable_progress_bars()
    with running_hub() as server:
        use_endpoint(monkeypatch, server.endpoint)
        new_cache(monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
