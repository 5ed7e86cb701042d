"""Finding the dictionaries of a run, a sweep or a folder, and what to call them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

_STEP = re.compile(r"step_\d+")
_VERSION = re.compile(r"version_\d+")
_RUN_FILES = ("config.yaml", "metrics.csv", "hparams.yaml")
_NOISE = ("sae", "final", "lightning_logs")
_ID_CHARACTERS = re.compile(r"[^A-Za-z0-9._=+/-]+")


@dataclass
class Dictionary:
    """A SAELens folder on disk.

    Args:
        sae_id: What it is called in a repository; the folder it gets there.
        path: The folder.
        cfg: Its ``cfg.json``.
        run: The folder of the run it comes from, with ``config.yaml`` or ``metrics.csv``; None if there is none.
        name: Its name among several dictionaries of one run, else None.
    """

    sae_id: str
    path: Path
    cfg: dict[str, Any]
    run: Path | None = None
    name: str | None = None
    metadata: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.metadata = dict(self.cfg.get("metadata") or {})


def is_dictionary(path: Path) -> bool:
    """Whether ``path`` is a SAELens folder: a config beside weights."""
    return (path / SAE_CFG_FILENAME).is_file() and (path / SAE_WEIGHTS_FILENAME).is_file()


def find_dictionaries(root: str | Path, *, sae_id: str | None = None) -> list[Dictionary]:
    """The finished dictionaries in a folder: of one run, of several, or one SAELens folder itself.

    What a run wrote beside its checkpoints (``sae/step_N``) is left out; name such a folder itself to have it.

    Args:
        root: A SAELens folder, a run's folder, or a folder of runs.
        sae_id: Name for the only dictionary there.

    Returns:
        In the order of their IDs, which are the folders' names without what every run has (``sae/final``, ``version_0``). A single
        dictionary is called after its hook.

    Raises:
        FileNotFoundError: If there is no such folder, or no finished dictionary in it.
        ValueError: For an unusable ID, or a ``cfg.json`` that is none.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {str(root)!r}: give a run's folder, a SAELens folder, or a folder of several"
        )
    paths = [root] if is_dictionary(root) else _below(root)
    if not paths:
        raise FileNotFoundError(
            f"no dictionary below {str(root)!r}: looked for {SAE_CFG_FILENAME} beside {SAE_WEIGHTS_FILENAME} "
            "(a run writes them to sae/final when it ends; a sae/step_N folder can be named itself)"
        )
    if sae_id is not None and len(paths) > 1:
        raise ValueError(f"an ID can be given to one dictionary only, and below {str(root)!r} there are {len(paths)}")
    cfgs = [read_cfg(path) for path in paths]
    ids = [sae_id] if sae_id is not None else _ids(root, paths, cfgs)
    found = [Dictionary(check_id(i), path, cfg, *_run_of(path)) for i, path, cfg in zip(ids, paths, cfgs, strict=True)]
    return sorted(found, key=lambda d: d.sae_id)


def read_cfg(path: Path) -> dict[str, Any]:
    """``cfg.json`` of a SAELens folder.

    Raises:
        ValueError: If it is no JSON object, or lacks the architecture or the sizes.
    """
    file = path / SAE_CFG_FILENAME
    try:
        cfg = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    missing = [key for key in ("d_in", "d_sae") if key not in cfg] if isinstance(cfg, dict) else ["d_in", "d_sae"]
    if missing:
        raise ValueError(f"{file} is not the config of a SAELens dictionary: it has no {' and no '.join(missing)}")
    return dict(cfg)


def check_id(sae_id: str) -> str:
    """``sae_id`` if it can be a folder in a repository.

    Raises:
        ValueError: If it cannot.
    """
    parts = sae_id.split("/")
    if _ID_CHARACTERS.search(sae_id) or any(part in ("", ".", "..") for part in parts) or parts[0] == ".git":
        raise ValueError(
            f"{sae_id!r} cannot be the ID of a dictionary: use letters, digits and . _ = + -, with / between folders"
        )
    return sae_id


def _below(root: Path) -> list[Path]:
    found = []
    for cfg_file in sorted(root.rglob(SAE_CFG_FILENAME)):
        path, parts = cfg_file.parent, cfg_file.parent.relative_to(root).parts
        if not is_dictionary(path) or any(part.startswith(".") for part in parts):
            continue
        # steps are a run's checkpoints whether they lie right here or below `sae`
        if not any(_STEP.fullmatch(part) for part in parts):
            found.append(path)
    return found


def _ids(root: Path, paths: list[Path], cfgs: list[dict[str, Any]]) -> list[str]:
    def clean(parts: tuple[str, ...], keep_versions: bool) -> str:
        kept = [p for p in parts if p not in _NOISE and (keep_versions or not _VERSION.fullmatch(p))]
        return _ID_CHARACTERS.sub("-", "/".join(kept)).strip("-/")

    if len(paths) == 1:
        inner = clean(paths[0].relative_to(root).parts, False)
        hook = (cfgs[0].get("metadata") or {}).get("hook_name") or cfgs[0].get("hook_name")
        outer = [name for part in root.resolve().parts if (name := clean((part,), False))]
        return [inner or (_ID_CHARACTERS.sub("-", str(hook)) if hook else outer[-1] if outer else "sae")]
    relative = [path.relative_to(root).parts for path in paths]
    short = [clean(parts, False) for parts in relative]
    longer = [clean(parts, True) for parts in relative]
    ids = [s if s and short.count(s) == 1 else long for s, long in zip(short, longer, strict=True)]
    return [i if i and ids.count(i) == 1 else "/".join(parts) for i, parts in zip(ids, relative, strict=True)]


def _run_of(path: Path) -> tuple[Path | None, str | None]:
    """The run that wrote ``path`` (``<run>/sae/final``, or ``<run>/sae/final/<name>`` for one of several), and the name."""
    path = path.resolve()
    for up in (path, *path.parents):
        if up.parent.name == "sae" and (up.name == "final" or _STEP.fullmatch(up.name)):
            run = up.parent.parent
            if any((run / file).is_file() for file in _RUN_FILES):
                return run, path.relative_to(up).as_posix() if path != up else None
    return None, None
