"""Which checkpoint a command goes on from, and what it says and leaves when it ends early."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from aen_lightning.cli.errors import UsageError
from aen_lightning.runs.layout import CONFIG_FILE, DICTIONARIES_FOLDER, METRICS_FILE, checkpoints, versions
from aen_lightning.training.checkpoints import newest_whole
from aen_lightning.training.settings import differences, settings_of_config


def find_checkpoint(root: Path, config: Mapping[str, Any], *, any_settings: bool) -> Path | None:
    """The newest whole checkpoint of the newest run below ``root`` that has one and was run with the same settings.

    Damaged ones are named and passed over, and so are newer runs with other settings.

    Args:
        root: The folder with ``version_0``, ``version_1``, ...
        config: Of the command.
        any_settings: Whether runs with other settings count as well.
    """
    wanted, other = settings_of_config(config), ""
    for run in reversed(versions(root)):
        if not any_settings and (changed := _changed(run, wanted)):
            other = other or f"the newest run there, {run.name}, has others: {'; '.join(changed)}"
            continue
        found, damaged = newest_whole(checkpoints(run))
        for path in damaged:
            rank_zero_warn(f"{path} is damaged: looking for an older one")
        if found is not None:
            rank_zero_info(f"resuming from {found}")
            return found
    if other:
        rank_zero_warn(f"no run with these settings in {root} has a checkpoint; {other}")
    return None


def _changed(run: Path, wanted: Mapping[str, Any]) -> list[str]:
    try:
        config = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return [f"its {CONFIG_FILE} cannot be read ({type(error).__name__})"]
    if not isinstance(config, dict):
        return [f"its {CONFIG_FILE} holds no settings"]
    return differences(settings_of_config(config), wanted)


def checkpoint_to_resume(config: Mapping[str, Any]) -> Path | None:
    """What ``--resume auto`` and ``--ckpt_path last`` stand for; None to begin anew.

    Raises:
        UsageError: If both are given, or there is no last checkpoint.
    """
    ckpt_path, auto = config.get("ckpt_path"), config.get("resume") == "auto"
    if auto and ckpt_path is not None:
        raise UsageError("give --resume auto or --ckpt_path, not both")
    root = Path((config.get("trainer") or {}).get("default_root_dir") or Path.cwd())
    found = find_checkpoint(root, config, any_settings=bool(config.get("force_resume")))
    if found is None and not auto:
        raise UsageError(
            f"no last checkpoint of a run with these settings in {root}: give --ckpt_path FILE, or --resume auto, "
            "which begins anew where there is none"
        )
    if found is None:
        rank_zero_info(f"nothing to resume in {root}: beginning at step 0")
    return found


def resume_line(command: str, args: Iterable[str], checkpoint: Path) -> str:
    """The command that goes on from a checkpoint."""
    words: list[str] = []
    skip = False
    for word in args:
        is_old = word.partition("=")[0].replace("-", "_") in ("__ckpt_path", "__resume")
        if not is_old and not skip:
            words.append(word)
        skip = is_old and "=" not in word
    return shlex.join(["aen", command, *words, "--ckpt_path", str(checkpoint)])


def remove_failed_start(folder: Path) -> None:
    """Remove a run's folder that holds neither a number nor a weight: its run failed before the first step."""
    holds = (folder / METRICS_FILE, folder / DICTIONARIES_FOLDER, *checkpoints(folder))
    if folder.is_dir() and not any(path.exists() for path in holds):
        shutil.rmtree(folder)
