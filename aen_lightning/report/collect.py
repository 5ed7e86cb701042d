"""Reads the runs a report is about, and the results of other commands about their dictionaries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aen_lightning.evaluate.results import short_names
from aen_lightning.report.naming import family_of, name_dictionaries
from aen_lightning.report.runs import Dictionary, read_bare, read_json, read_run


@dataclass
class Report:
    """What :func:`collect` found.

    Args:
        dictionaries: In the order of the runs given, and of their members.
        configs: Text of each run's ``config.yaml``, by name of the run; absent if it has none.
        comparisons: JSONs of ``aen compare``.
        notes: What was looked for and not found, a sentence each.
    """

    dictionaries: list[Dictionary]
    configs: dict[str, str] = field(default_factory=dict)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def collect(runs: Sequence[str | Path], results: Sequence[str | Path] = ()) -> Report:
    """Read runs, and results of other commands about their dictionaries.

    Args:
        runs: Folders that ``aen fit`` or ``aen sweep`` left (``metrics.csv``, ``sae/``, ...), folders of such
            ``version_N`` (the last is taken, with a note), or SAELens folders (``cfg.json``).
        results: JSON files of ``aen evaluate``, ``aen diagnose`` (told apart, and matched with a dictionary by its path) and
            ``aen compare``. Those in a dictionary's own folder are found without being named.

    Raises:
        FileNotFoundError: If a folder or file is not there, or a folder holds no run.
        ValueError: If a file is not what it should be, or is about no dictionary of the report.
    """
    if not runs:
        raise ValueError("a report needs at least one run folder, got none")
    report = Report([])
    folders = [_run_folder(Path(run), report.notes) for run in runs]
    if twice := [f for f in folders if folders.count(f) > 1]:
        raise ValueError(f"the run {twice[0]} was given more than once")
    for folder, run in zip(folders, _run_names(folders), strict=True):
        if (folder / "config.yaml").is_file():
            report.configs[run] = (folder / "config.yaml").read_text(encoding="utf-8")
        is_dictionary = (folder / "cfg.json").is_file()
        report.dictionaries += [read_bare(folder, run)] if is_dictionary else read_run(folder, run, report.notes)
    for d in report.dictionaries:
        d.family = family_of(d.cfg, d.settings)
        for name in ("evaluation", "diagnosis"):
            if d.folder is not None and (path := d.folder / f"{name}.json").is_file():
                setattr(d, name, read_result(path))
    name_dictionaries(report.dictionaries)
    for path in map(Path, results):
        _add_result(report, read_result(path), path)
    return report


def _run_folder(folder: Path, notes: list[str]) -> Path:
    """The folder itself, or the last ``version_N`` in it."""
    if any((folder / n).is_file() for n in ("metrics.csv", "cfg.json")) or (folder / "sae").is_dir():
        return folder.resolve()
    versions = [p for p in folder.glob("version_*") if p.name[8:].isdigit() and p.is_dir()]
    if versions:
        last = max(versions, key=lambda p: int(p.name[8:]))
        if len(versions) > 1:
            notes.append(f"{folder} holds {len(versions)} runs; the last, {last.name}, is shown.")
        return _run_folder(last, notes)
    what = "is no folder" if not folder.is_dir() else "holds no run"
    raise FileNotFoundError(
        f"{folder} {what}: expected what aen fit or aen sweep writes (metrics.csv, sae/), version_N folders of it, or a "
        "dictionary (cfg.json)"
    )


def _run_names(folders: Sequence[Path]) -> list[str]:
    """Short and distinct; ``version_0`` alone says nothing, so its parent's name stands before it."""
    depth_two = any(re.fullmatch(r"version_\d+", f.name) for f in folders)
    names = ["/".join(f.parts[-2:]) for f in folders] if depth_two else short_names([str(f) for f in folders])
    return names if len(set(names)) == len(names) else short_names([str(f) for f in folders])


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a JSON that a command of this package wrote.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is none.
    """
    content = read_json(Path(path))
    known = ("evaluate", "diagnose", "compare")
    if content.get("command") not in known:
        raise ValueError(
            f"{path} is no result of aen {', aen '.join(known)}: its 'command' is {content.get('command')!r}"
        )
    return content


def _add_result(report: Report, content: dict[str, Any], path: Path) -> None:
    if content["command"] == "compare":
        report.comparisons.append(content)
        return
    about = Path(content["dictionary"]["path"]).resolve()
    mine = [d for d in report.dictionaries if d.folder is not None and d.folder.resolve() == about]
    if not mine and len(report.dictionaries) == 1:
        mine = report.dictionaries
        report.notes.append(f"{path} is about {about}; it is shown with {mine[0].label}, the only dictionary here.")
    if not mine:
        raise ValueError(
            f"{path} is about {about}, which is no dictionary of this report; there are "
            f"{', '.join(str(d.folder) for d in report.dictionaries[:5])}"
        )
    setattr(mine[0], {"evaluate": "evaluation", "diagnose": "diagnosis"}[content["command"]], content)
