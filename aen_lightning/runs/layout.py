"""Where a run leaves what: the one place that knows.

A run's folder is its logger's: ``version_N`` in the folder that was asked for. It holds ::

    config.yaml         the whole configuration, as LightningCLI writes it
    metrics.csv         the curves, as Lightning's CSVLogger writes them
    checkpoints/        Lightning's checkpoints
    sae/step_N          the dictionary at a checkpoint, as a SAELens folder
    sae/interrupted     the dictionary where a signal stopped the run
    sae/final           the dictionary at the end
    sweep.csv           a row for each SAE of a sweep; sweep.parquet holds the same
    pareto.json         the fronts of a sweep
    refit.csv           the metrics before and after a refit

Where a run trains several SAEs, ``sae/step_N`` and ``sae/final`` hold a folder for each, by its name.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.csv"
SWEEP_FILE = "sweep.csv"
SWEEP_PARQUET_FILE = "sweep.parquet"
PARETO_FILE = "pareto.json"
REFIT_FILE = "refit.csv"
DICTIONARIES_FOLDER = "sae"
FINAL_FOLDER = "final"
INTERRUPTED_FOLDER = "interrupted"
CHECKPOINTS_FOLDER = "checkpoints"
INTERRUPTED_CHECKPOINT = "interrupted.ckpt"
_STEP = re.compile(r"step_(\d+)")
_VERSION = re.compile(r"version_(\d+)")
_SLURM_CHECKPOINT = re.compile(r"hpc_ckpt_(\d+)\.ckpt")


def step_folder(step: int) -> str:
    """Name of the folder of a checkpoint's dictionaries, after ``step`` optimizer steps."""
    return f"step_{step}"


def is_step(name: str) -> bool:
    """Whether a folder is called as the dictionaries of a run that goes on are: at a checkpoint, or interrupted."""
    return name == INTERRUPTED_FOLDER or _STEP.fullmatch(name) is not None


def is_version(name: str) -> bool:
    """Whether a folder is called as Lightning's loggers call a run: ``version_0``."""
    return _VERSION.fullmatch(name) is not None


def is_dictionary(folder: Path) -> bool:
    """Whether a folder is one of SAELens: a config beside weights."""
    return (folder / SAE_CFG_FILENAME).is_file() and (folder / SAE_WEIGHTS_FILENAME).is_file()


def is_run(folder: Path) -> bool:
    """Whether a folder holds curves or dictionaries of a run."""
    return (folder / METRICS_FILE).is_file() or (folder / DICTIONARIES_FOLDER).is_dir()


def versions(folder: Path) -> list[Path]:
    """The folders ``version_N`` in ``folder``, in the order of N."""
    numbered = [(int(m[1]), p) for p in folder.glob("*") if p.is_dir() and (m := _VERSION.fullmatch(p.name))]
    return [path for _, path in sorted(numbered)]


def export_folder(run: Path) -> Path | None:
    """``sae/final`` of a run, or of one that has not ended ``sae/interrupted`` or the last ``sae/step_N``, or None."""
    root = run / DICTIONARIES_FOLDER
    for name in (FINAL_FOLDER, INTERRUPTED_FOLDER):
        if (root / name).is_dir():
            return root / name
    steps = [(int(m[1]), p) for p in root.glob("*") if p.is_dir() and (m := _STEP.fullmatch(p.name))]
    return max(steps)[1] if steps else None


def run_of(folder: Path) -> tuple[Path | None, str]:
    """The run that wrote a dictionary, and the dictionary's name in it.

    Args:
        folder: ``RUN/sae/final`` or ``RUN/sae/final/NAME``, the same with ``step_N``, or any other folder.

    Returns:
        The run's folder, None if ``folder`` does not lie in one; and the name, empty for the only one of a
        run.
    """
    folder = folder.resolve()
    for up in (folder, *folder.parents):
        if up.parent.name == DICTIONARIES_FOLDER and (up.name == FINAL_FOLDER or is_step(up.name)):
            return up.parent.parent, folder.relative_to(up).as_posix() if folder != up else ""
    return None, ""


def slurm_checkpoints(root: Path) -> list[Path]:
    """The checkpoints in a root folder from which Lightning resumes requeued SLURM jobs, oldest first."""
    numbered = [(int(m[1]), p) for p in root.glob("*") if (m := _SLURM_CHECKPOINT.fullmatch(p.name))]
    return [path for _, path in sorted(numbered)]


def next_slurm_checkpoint(root: Path) -> Path:
    """Where the next such checkpoint goes; Lightning takes the one with the greatest number."""
    there = slurm_checkpoints(root)
    match = _SLURM_CHECKPOINT.fullmatch(there[-1].name) if there else None
    return root / f"hpc_ckpt_{int(match[1]) + 1 if match else 1}.ckpt"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, in no order."""
    return list((run / CHECKPOINTS_FOLDER).glob("*.ckpt"))
