"""Reading the authors' ``.pt`` checkpoints (arXiv:2605.05341) as what they are: files of a stranger.

Tensors are memory-mapped and never copied here; a pickle that wants anything but tensors, plain containers
and numbers is refused before it runs.
"""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aen_lightning.hub.checkpoint_settings import KINDS, Kind, checked_k, kind_of, last_metrics, settings_of
from aen_lightning.hub.retry import summary
from aen_lightning.runs.checkpoint import DAMAGED

_WEIGHTS = ("b_dec", "encoder.weight", "encoder.bias", "decoder.weight")
_ADAPTIVE_STATE = ("ema_abs_activations", "_step_count")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since numpy 2
# Beyond what torch allows: containers and numbers that settings and logged metrics are made of. None of them
# runs code when built.
_HARMLESS: list[Any] = [
    OrderedDict, defaultdict, argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, np.ndarray,
    np.dtype,
    *(type(np.dtype(t)) for t in (np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_)),
    *((np.float64(0).__reduce__()[0], f"{module}.scalar") for module in _NUMPY_MODULES),
    *((np.zeros(0).__reduce__()[0], f"{module}._reconstruct") for module in _NUMPY_MODULES),
]  # fmt: skip


@dataclass
class Checkpoint:
    """One of the authors' checkpoints, checked.

    Args:
        encoder: ``(d_sae, d_in)``, memory-mapped, as all tensors here.
        encoder_bias: ``(d_sae,)``.
        decoder: ``(d_in, d_sae)``.
        b_dec: ``(d_in,)``.
        kind: What was trained.
        settings: Numbers known from the file's name and from within: ``k``, ``lambda_1``, ``lambda_2``,
            ``gamma``, ``beta``, ...
        run_name: The authors' name of the run.
        ema: ``ema_abs_activations``, ``(d_sae,)``, of adaptive models.
        n_steps: ``_step_count`` of adaptive models.
        metrics: Last value of each number in ``metrics_history``.
        source: Where it is from.
    """

    encoder: Tensor
    encoder_bias: Tensor
    decoder: Tensor
    b_dec: Tensor
    kind: Kind
    settings: dict[str, float] = field(default_factory=dict)
    run_name: str | None = None
    ema: Tensor | None = None
    n_steps: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    source: str = ""

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.encoder.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.encoder.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.encoder.dtype


def read_checkpoint(
    path: str | Path, *, name: str | None = None, kind: Kind | None = None, k: int | None = None
) -> Checkpoint:
    """Read and check a checkpoint.

    Args:
        path: The ``.pt`` file.
        name: Its path where it came from, which says what it is; None: ``path``.
        kind: What was trained; None: from the name and the content.
        k: Of a TopK model; None: from the name, or the content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it carries code, misses a tensor, has one too many, or disagrees with itself; the
            message says in what.
    """
    path = Path(path)
    name = path.resolve().as_posix() if name is None else name
    content = _load(path)
    where = f"{path.name} is refused"
    state = content.get("model_state_dict")
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{where}: it has no 'model_state_dict'; its keys are {', '.join(map(str, content)) or 'none'}"
        )
    _check_tensors(state, where)
    kind = kind or kind_of(name, content, "ema_abs_activations" in state)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    settings = settings_of(name, content, state, where)
    if kind == "topk":
        settings["k"] = checked_k(k, settings.get("k"), state["encoder.weight"].shape[0], where)
    elif k is not None:
        raise ValueError(
            f"k={k} was given, but this is no TopK model but {kind}: leave it out, or give kind='topk'"
        )
    else:
        settings.pop("k", None)
    steps = state.get("_step_count")
    return Checkpoint(
        encoder=state["encoder.weight"],
        encoder_bias=state["encoder.bias"],
        decoder=state["decoder.weight"],
        b_dec=state["b_dec"],
        kind=kind,
        settings=settings,
        run_name=content["run_name"] if isinstance(content.get("run_name"), str) else None,
        ema=state.get("ema_abs_activations"),
        n_steps=None if steps is None else int(steps),
        metrics=last_metrics(content.get("metrics_history")),
        source=name,
    )


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    where = f"{path.name} is refused"
    mapped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = re.findall(r"GLOBAL ([\w.]+)", str(error)) or (_globals_of(path) if mapped else [])
        why = (
            f"would run code (it wants {', '.join(sorted(set(wanted)))})"
            if wanted
            else "holds more than tensors and settings"
        )
        raise ValueError(f"{where}: its pickle {why}; nothing of it was run") from error
    except DAMAGED as error:
        raise ValueError(f"{where}: it is damaged, or no PyTorch checkpoint ({summary(error)})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: it holds a {type(content).__name__}, not the dict that the authors save")
    return content


def _globals_of(path: Path) -> list[str]:
    """What its pickle names beyond tensors and plain data; nothing, if the pickle cannot be read to its end."""
    with torch.serialization.safe_globals(_HARMLESS):
        try:
            return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except DAMAGED:  # it is refused in any case
            return []


def _check_tensors(state: Mapping[str, Any], where: str) -> None:
    missing = [name for name in _WEIGHTS if name not in state]
    if missing:
        raise ValueError(
            f"{where}: it misses {', '.join(missing)}; it has {', '.join(map(str, state)) or 'nothing'}"
        )
    unknown = [str(name) for name in state if name not in (*_WEIGHTS, *_ADAPTIVE_STATE)]
    if unknown:
        raise ValueError(f"{where}: it has tensors of another model: {', '.join(unknown)}")
    not_tensors = [name for name in state if not isinstance(state[name], Tensor)]
    if not_tensors:
        raise ValueError(
            f"{where}: {not_tensors[0]} is a {type(state[not_tensors[0]]).__name__}, not a tensor"
        )
    encoder = state["encoder.weight"]
    if encoder.ndim != 2 or 0 in encoder.shape:
        raise ValueError(f"{where}: encoder.weight has shape {tuple(encoder.shape)}, not (d_sae, d_in)")
    d_sae, d_in = encoder.shape
    shapes = {
        "encoder.bias": (d_sae,),
        "decoder.weight": (d_in, d_sae),
        "b_dec": (d_in,),
        "ema_abs_activations": (d_sae,),
        "_step_count": (),
    }
    for name, shape in shapes.items():
        if name in state and tuple(state[name].shape) != shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(state[name].shape)}, but encoder.weight "
                f"{tuple(encoder.shape)} asks for {shape}"
            )
    dtypes = {state[name].dtype for name in _WEIGHTS}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        raise ValueError(
            f"{where}: its weights are {' and '.join(sorted(str(d) for d in dtypes))}, not one "
            "floating-point type"
        )
