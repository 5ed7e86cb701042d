"""What dictionaries are called in a repository: IDs made from the names of their folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from aen_lightning.runs.layout import DICTIONARIES_FOLDER, FINAL_FOLDER, is_version

_IN_EVERY_RUN = (DICTIONARIES_FOLDER, FINAL_FOLDER, "lightning_logs")
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9._=+/-]+")


def check_id(sae_id: str, *, found_in: Path | None = None) -> str:
    """``sae_id`` if it can be a folder in a repository.

    Args:
        sae_id: The ID.
        found_in: The dictionary whose files say so, for the message; None: somebody gave it.

    Raises:
        ValueError: If it cannot.
    """
    parts = sae_id.split("/")
    if _NOT_ALLOWED.search(sae_id) or any(part in ("", ".", "..") for part in parts) or parts[0] == ".git":
        origin = "" if found_in is None else f"{found_in}: "
        raise ValueError(
            f"{origin}{sae_id!r} cannot be the ID of a dictionary: use letters, digits and . _ = + -, with / "
            f"between folders"
        )
    return sae_id


def id_of_one(root: Path, path: Path, hook_name: object) -> str:
    """ID of the only dictionary below ``root``: its own folder there, its hook, or the folder around it."""
    if inner := _joined(path.relative_to(root).parts):
        return inner
    if hook_name:
        return _NOT_ALLOWED.sub("-", str(hook_name))
    outer = [name for part in root.resolve().parts if (name := _joined((part,)))]
    return outer[-1] if outer else "sae"


def ids_of_several(folders: Sequence[tuple[str, ...]]) -> list[str]:
    """IDs that tell several dictionaries apart.

    Args:
        folders: Parts of each one's path below the folder that holds all.
    """
    short = [_joined(parts) for parts in folders]
    longer = [_joined(parts, with_version=True) for parts in folders]
    ids = [s if s and short.count(s) == 1 else long for s, long in zip(short, longer, strict=True)]
    return [i if i and ids.count(i) == 1 else "/".join(parts) for i, parts in zip(ids, folders, strict=True)]


def _joined(parts: tuple[str, ...], *, with_version: bool = False) -> str:
    kept = [part for part in parts if part not in _IN_EVERY_RUN and (with_version or not is_version(part))]
    return _NOT_ALLOWED.sub("-", "/".join(kept)).strip("-/")
