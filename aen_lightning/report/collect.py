"""Reads the runs a report is about, and the results of other commands about their dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aen_lightning.diagnostics.diagnose import RESULT_FILE as DIAGNOSIS_FILE
from aen_lightning.evaluate.evaluate import RESULT_FILE as EVALUATION_FILE
from aen_lightning.evaluate.results import short_names
from aen_lightning.files.redaction import without_secrets_in_config
from aen_lightning.report.naming import family_of, name_dictionaries
from aen_lightning.report.result_files import read_result
from aen_lightning.report.trained import TrainedSAE, read_bare, read_run
from aen_lightning.runs.dictionary import dictionaries_in
from aen_lightning.runs.layout import CONFIG_FILE, is_dictionary, is_run, is_version, versions

_RESULTS = {"evaluate": "evaluation", "diagnose": "diagnosis"}  # command: where its result belongs
_RESULT_FILES = {"evaluation": EVALUATION_FILE, "diagnosis": DIAGNOSIS_FILE}


@dataclass
class Report:
    """What :func:`collect` found.

    Args:
        dictionaries: The SAEs, in the order of the runs given, and of each run's members.
        configs: Text of each run's ``config.yaml``, without secrets, by name of the run; absent if it has
            none.
        comparisons: JSONs of ``aen compare``.
        notes: What was looked for and not found, a sentence each.
    """

    dictionaries: list[TrainedSAE]
    configs: dict[str, str] = field(default_factory=dict)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def collect(runs: Sequence[str | Path], results: Sequence[str | Path] = ()) -> Report:
    """Read runs, and results of other commands about their dictionaries.

    Args:
        runs: Folders that ``aen fit`` or ``aen sweep`` left (``metrics.csv``, ``sae/``, ...), folders of such
            ``version_N`` (the last is taken, with a note), or SAELens folders (``cfg.json``).
        results: JSON files of ``aen evaluate``, ``aen diagnose`` (told apart, and matched with a dictionary
            by its path) and ``aen compare``. Those in a dictionary's own folder are found without being
            named.

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
        if (folder / CONFIG_FILE).is_file():
            text = (folder / CONFIG_FILE).read_text(encoding="utf-8", errors="replace")
            report.configs[run] = without_secrets_in_config(text)  # an older run may have left some in it
        if is_dictionary(folder):
            report.dictionaries += [read_bare(dictionary, run) for dictionary in dictionaries_in(folder)]
        else:
            report.dictionaries += read_run(folder, run, report.notes)
    for d in report.dictionaries:
        d.family = family_of(d.training_architecture, d.settings)
        for attribute, file_name in _RESULT_FILES.items():
            if d.folder is not None and (path := d.folder / file_name).is_file():
                setattr(d, attribute, read_result(path))
    name_dictionaries(report.dictionaries)
    for path in map(Path, results):
        _add_result(report, read_result(path), path)
    return report


def _run_folder(folder: Path, notes: list[str]) -> Path:
    """The folder itself, or the last ``version_N`` in it."""
    if is_dictionary(folder) or is_run(folder):
        return folder.resolve()
    if found := versions(folder):
        if len(found) > 1:
            notes.append(f"{folder} holds {len(found)} runs; the last, {found[-1].name}, is shown.")
        return _run_folder(found[-1], notes)
    what = "is no folder" if not folder.is_dir() else "holds no run"
    raise FileNotFoundError(
        f"{folder} {what}: expected what aen fit or aen sweep writes (metrics.csv, sae/), version_N folders "
        f"of it, or a "
        "dictionary (cfg.json)"
    )


def _run_names(folders: Sequence[Path]) -> list[str]:
    """Short and distinct; ``version_0`` alone says nothing, so its parent's name stands before it."""
    depth_two = any(is_version(folder.name) for folder in folders)
    names = ["/".join(f.parts[-2:]) for f in folders] if depth_two else short_names([str(f) for f in folders])
    return names if len(set(names)) == len(names) else short_names([str(f) for f in folders])


def _add_result(report: Report, content: dict[str, Any], path: Path) -> None:
    if content["command"] == "compare":
        report.comparisons.append(content)
        return
    if content.get("dictionary") is None:
        raise ValueError(f"{path} does not say which dictionary it is about: dictionary.path is missing")
    about = Path(content["dictionary"]["path"]).resolve()
    mine = [d for d in report.dictionaries if d.folder is not None and d.folder.resolve() == about]
    if not mine and len(report.dictionaries) == 1:
        mine = report.dictionaries
        report.notes.append(
            f"{path} is about {about}; it is shown with {mine[0].label}, the only dictionary here."
        )
    if not mine:
        raise ValueError(
            f"{path} is about {about}, which is no dictionary of this report; there are "
            f"{', '.join(str(d.folder) for d in report.dictionaries[:5])}"
        )
    setattr(mine[0], _RESULTS[content["command"]], content)
