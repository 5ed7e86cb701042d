"""Where huggingface_hub looks for the Hub and its cache, which it reads from the environment when it is
imported.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """What HF_ENDPOINT sets."""
    monkeypatch.setattr(hub_constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )


def new_cache(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """What HF_HUB_CACHE sets."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(path))
