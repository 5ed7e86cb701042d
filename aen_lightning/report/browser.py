"""Pictures of the report by a Chromium that is there; none is installed or downloaded."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from html import unescape
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--virtual-time-budget=20000",
)  # fmt: skip
WIDTH_PX = 1280
_OPEN = "open=2&rows=24"  # of features, in pictures: so many unfolded, so many listed
_HIGHEST_PX = 16000  # Chromium's textures end at 16384


def find_browser(given: str | None = None) -> str | None:
    """Path of a Chromium or Chrome: the given one, or the first known name that can be run, or None.

    Raises:
        FileNotFoundError: If the given one cannot be run.
    """
    if given is not None:
        if (found := shutil.which(given)) is None:
            raise FileNotFoundError(
                f"no browser {given!r}: give the path of a Chromium or Chrome, or leave --browser out"
            )
        return found
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


def dump_dom(browser: str, page: Path, fragment: str = "", *, timeout_seconds: float = 120) -> str:
    """The page's HTML after its scripts have run."""
    return _run(browser, page, fragment, ["--dump-dom"], timeout_seconds).decode("utf-8")


def take_pictures(
    browser: str, page: Path, folder: Path, ids: Sequence[str], *, timeout_seconds: float = 120
) -> list[Path]:
    """A PNG of the whole report, and one of each card.

    Args:
        browser: From :func:`find_browser`.
        page: The report.
        folder: Where to write ``report.png`` and ``<id>.png``; made if missing.
        ids: Of the cards.
        timeout_seconds: For each start of the browser: one, and one a picture.

    Raises:
        RuntimeError: If the browser fails or makes no picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    heights = measure(browser, page, _OPEN, timeout_seconds=timeout_seconds)
    paths = []
    for name in ("report", *ids):
        fragment = _OPEN if name == "report" else f"only={name}&{_OPEN}"
        height = heights["page"] + 40 if name == "report" else heights["legend"] + heights[name] + 30
        path = (folder / f"{name}.png").resolve()
        size = f"--window-size={WIDTH_PX},{min(height, _HIGHEST_PX)}"
        _run(browser, page, fragment, [f"--screenshot={path}", size], timeout_seconds)
        if not path.is_file():
            raise RuntimeError(f"{browser} made no picture {path}")
        paths.append(path)
    return paths


def measure(browser: str, page: Path, fragment: str = "", *, timeout_seconds: float = 120) -> dict[str, int]:
    """Heights in pixels: ``page``, ``legend``, and each card by its id. The page notes them when it is drawn.

    Raises:
        RuntimeError: If its scripts did not finish.
    """
    dom = dump_dom(browser, page, fragment, timeout_seconds=timeout_seconds)
    match = re.search(r'<html[^>]*\bdata-heights="([^"]+)"', dom)
    if match is None:
        raise RuntimeError(f"the scripts of {page} did not finish in {browser}: open it by hand to see why")
    heights: dict[str, int] = json.loads(unescape(match[1]))
    return heights


def _run(browser: str, page: Path, fragment: str, flags: Sequence[str], timeout_seconds: float) -> bytes:
    address = page.resolve().as_uri() + (f"#{fragment}" if fragment else "")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            browser,
            *_FLAGS,
            f"--user-data-dir={profile}",
            f"--window-size={WIDTH_PX},1200",
            *flags,
            address,
        ]
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout_seconds, check=False)
        except subprocess.TimeoutExpired as e:
            raise RuntimeError(f"{browser} did not finish within {timeout_seconds:g} s on {page}") from e
    if done.returncode != 0:
        raise RuntimeError(
            f"{browser} failed ({done.returncode}) on {page}: {done.stderr.decode(errors='replace')[-500:]}"
        )
    return done.stdout
