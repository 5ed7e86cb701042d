"""Reading the authors' ``.pt`` checkpoints (arXiv:2605.05341) as what they are: files of a stranger.

Tensors are memory-mapped and never copied here; a pickle that wants anything but tensors, plain containers and numbers is
refused before it runs.
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
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from aen_lightning.hub.retry import summary

Kind = Literal["adaptive_elastic_net", "adaptive_lasso", "elastic_net", "l1", "topk"]
KINDS: tuple[Kind, ...] = ("adaptive_elastic_net", "adaptive_lasso", "elastic_net", "l1", "topk")

_WEIGHTS = ("b_dec", "encoder.weight", "encoder.bias", "decoder.weight")
_ADAPTIVE_STATE = ("ema_abs_activations", "_step_count")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since numpy 2
# Beyond what torch allows: containers and numbers that settings and logged metrics are made of. None of them runs code when built.
_HARMLESS: list[Any] = [
    OrderedDict, defaultdict, argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, np.ndarray, np.dtype,
    *(type(np.dtype(t)) for t in (np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_)),
    *((np.float64(0).__reduce__()[0], f"{module}.scalar") for module in _NUMPY_MODULES),
    *((np.zeros(0).__reduce__()[0], f"{module}._reconstruct") for module in _NUMPY_MODULES),
]  # fmt: skip
# Settings that say the same under several spellings; compared where a checkpoint states them more than once.
_SPELLINGS = {
    "d_in": ("d_in", "input_dim", "activation_dim", "d_model"),
    "d_sae": ("d_sae", "dict_size", "hidden_dim", "latent_dim", "n_features", "n_latents"),
    "k": ("k", "topk", "top_k"),
    "lambda_1": ("lambda_1", "lambda1", "l1_coefficient", "l1_lambda", "l1_coeff"),
    "lambda_2": ("lambda_2", "lambda2", "l2_coefficient", "l2_lambda", "l2_coeff"),
    "gamma": ("gamma",),
    "beta": ("beta", "ema_decay", "ema_beta"),
    "top_fraction": ("top_fraction", "reference_fraction"),
}
_NAME_PARTS = {
    "k": r"(?:^|[_/-])k(\d+)(?=[_/.-]|$)",
    "lambda_1": r"lambda_?1_(\d+(?:p\d+)?(?:e-?\d+)?)",
    "lambda_2": r"lambda_?2_(\d+(?:p\d+)?(?:e-?\d+)?)",
    "gamma": r"gamma_(\d+(?:p\d+)?)",
    "beta": r"beta_(\d+(?:p\d+)?)",
}


@dataclass
class Checkpoint:
    """One of the authors' checkpoints, checked.

    Args:
        encoder: ``(d_sae, d_in)``, memory-mapped, as all tensors here.
        encoder_bias: ``(d_sae,)``.
        decoder: ``(d_in, d_sae)``.
        b_dec: ``(d_in,)``.
        kind: What was trained.
        settings: Numbers known from the file's name and from within: ``k``, ``lambda_1``, ``lambda_2``, ``gamma``, ``beta``, ...
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
        ValueError: If it carries code, misses a tensor, has one too many, or disagrees with itself; the message says in what.
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
    kind = kind or _kind(name, content, "ema_abs_activations" in state)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    settings = _settings(name, content, state, where)
    if kind == "topk":
        settings["k"] = _checked_k(k, settings.get("k"), state["encoder.weight"].shape[0], where)
    elif k is not None:
        raise ValueError(f"k={k} was given, but this is no TopK model but {kind}: leave it out, or give kind='topk'")
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
        metrics=_last_metrics(content.get("metrics_history")),
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
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{where}: it is damaged, or no PyTorch checkpoint ({summary(error)})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: it holds a {type(content).__name__}, not the dict that the authors save")
    return content


def _globals_of(path: Path) -> list[str]:
    with torch.serialization.safe_globals(_HARMLESS):
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))


def _check_tensors(state: Mapping[str, Any], where: str) -> None:
    missing = [name for name in _WEIGHTS if name not in state]
    if missing:
        raise ValueError(f"{where}: it misses {', '.join(missing)}; it has {', '.join(map(str, state)) or 'nothing'}")
    unknown = [str(name) for name in state if name not in (*_WEIGHTS, *_ADAPTIVE_STATE)]
    if unknown:
        raise ValueError(f"{where}: it has tensors of another model: {', '.join(unknown)}")
    not_tensors = [name for name in state if not isinstance(state[name], Tensor)]
    if not_tensors:
        raise ValueError(f"{where}: {not_tensors[0]} is a {type(state[not_tensors[0]]).__name__}, not a tensor")
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
                f"{where}: {name} has shape {tuple(state[name].shape)}, but encoder.weight {tuple(encoder.shape)} asks for {shape}"
            )
    dtypes = {state[name].dtype for name in _WEIGHTS}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        raise ValueError(
            f"{where}: its weights are {' and '.join(sorted(str(d) for d in dtypes))}, not one floating-point type"
        )


def _kind(name: str, content: Mapping[str, Any], has_ema: bool) -> Kind:
    said = "/".join(
        [
            name,
            str(content.get("run_name") or ""),
            *_strings(content.get("trainer_config")),
            *_strings(content.get("run_metadata")),
        ]
    ).lower()
    found: Kind
    if re.search(r"(^|[/_.-])top_?k([/_.-]|$)", said):
        found = "topk"
    elif "adaptive_lasso" in said:
        found = "adaptive_lasso"
    elif "adaptive_elastic_net" in said or has_ema:
        found = "adaptive_elastic_net"
    elif "elastic_net" in said:
        found = "elastic_net"
    else:
        found = "l1"
    if has_ema and not found.startswith("adaptive"):
        raise ValueError(
            f"{name} is refused: it is called {found}, but holds the adaptive state 'ema_abs_activations'; say what it is with kind"
        )
    return found


def _strings(section: Any) -> list[str]:
    if not isinstance(section, Mapping):
        return []
    named = (
        "architecture",
        "arch",
        "model",
        "model_type",
        "method",
        "penalty",
        "regularization",
        "activation",
        "sae_type",
    )
    return [v for key, v in section.items() if isinstance(v, str) and str(key).lower() in named]


def _settings(name: str, content: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> dict[str, float]:
    """Numbers stated in the name, the sections and the shapes; a contradiction is an error."""
    d_sae, d_in = state["encoder.weight"].shape
    stated: dict[str, dict[str, float]] = {"d_in": {"the weights": d_in}, "d_sae": {"the weights": d_sae}}
    for key, pattern in _NAME_PARTS.items():
        match = re.search(pattern, name.rsplit("/", 1)[-1].removesuffix(".pt"))
        if match:
            stated.setdefault(key, {})["the file's name"] = float(match.group(1).replace("p", "."))
    for section in ("trainer_config", "run_metadata"):
        values: Any = content.get(section)
        values = vars(values) if isinstance(values, argparse.Namespace) else values
        for key, spellings in _SPELLINGS.items() if isinstance(values, Mapping) else ():
            number = next((values[s] for s in spellings if _is_number(values.get(s))), None)
            if number is not None:
                stated.setdefault(key, {})[section] = float(number)
    for key, sources in stated.items():
        first = next(iter(sources.values()))
        if any(abs(value - first) > 1e-6 * max(abs(first), abs(value)) for value in sources.values()):
            raise ValueError(
                f"{where}: it disagrees with itself on {key}: {', '.join(f'{v:g} by {s}' for s, v in sources.items())}"
            )
    return {key: next(iter(sources.values())) for key, sources in stated.items() if key not in ("d_in", "d_sae")}


def _checked_k(given: int | None, stated: float | None, d_sae: int, where: str) -> int:
    if given is not None and stated is not None and given != stated:
        raise ValueError(f"{where}: k={given} was given, but the checkpoint says k={stated:g}")
    k = given if given is not None else stated
    if k is None:
        raise ValueError(f"{where}: it is a TopK model, and neither its name nor its content says k: give it (--k)")
    if k != int(k) or not 0 < k <= d_sae:
        raise ValueError(f"{where}: k must be an integer from 1 to d_sae = {d_sae}, got {k:g}")
    return int(k)


def _last_metrics(history: Any) -> dict[str, float]:
    if isinstance(history, list) and history and isinstance(history[-1], Mapping):
        history = history[-1]
    if not isinstance(history, Mapping):
        return {}
    last = {str(key): value[-1] if isinstance(value, list) and value else value for key, value in history.items()}
    return {key: float(value) for key, value in last.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
