"""Lightning's checkpoints, looked at before a run goes on from one: a stranger's may be anything."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from aen_lightning.files.checked import FOREIGN, Count, Foreign, Word, check, shortened
from aen_lightning.spelling import printable

DAMAGED = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError,
    ValueError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What ``torch.load`` raises for a file that is damaged, beside a ``pickle.UnpicklingError`` that says what the
file would run."""


class _Checkpoint(Foreign):
    """What Lightning reads of a checkpoint; callbacks and loops check what is theirs."""

    model_config = FOREIGN | {"arbitrary_types_allowed": True}

    version: Annotated[Word, Field(alias="pytorch-lightning_version")]
    epoch: Count
    global_step: Count
    state_dict: Annotated[dict[Word, torch.Tensor], Field(min_length=1)]
    loops: dict[str, Any] | None = None
    callbacks: dict[str, Any] | None = None
    optimizer_states: list[dict[str, Any]] | None = None
    lr_schedulers: list[dict[str, Any]] | None = None
    hyper_parameters: Mapping[str, Any] | None = None


def require_checkpoint(path: str | Path) -> None:
    """Refuse a file that is no checkpoint of a run; its tensors are mapped, and not read.

    Raises:
        ValueError: In one line: that it is none, that it carries code, or which entry is wrong.
    """
    path = Path(path)
    if not zipfile.is_zipfile(path):  # what torch.save writes is one
        raise ValueError(f"{path} is no checkpoint, or was cut off while it was written")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: its pickle holds more than tensors and settings, and would run code; nothing of "
            "it was run"
        ) from error
    except DAMAGED as error:
        reason = " ".join(printable(str(error)).split())[:200]
        raise ValueError(f"{path} is damaged, or no PyTorch checkpoint: {reason}") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        what = (
            shortened(content)
            if not isinstance(content, dict)
            else f"keys {', '.join(map(str, content))[:200]}"
        )
        raise ValueError(f"{path} is no checkpoint of aen fit: it holds {printable(what)}, and no state_dict")
    check(_Checkpoint, content, path)
