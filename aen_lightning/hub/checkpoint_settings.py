"""What an authors' checkpoint is: told by its name, its sections and its tensors, which must not disagree."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from torch import Tensor

Kind = Literal["adaptive_elastic_net", "adaptive_lasso", "elastic_net", "l1", "topk"]
KINDS: tuple[Kind, ...] = ("adaptive_elastic_net", "adaptive_lasso", "elastic_net", "l1", "topk")

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


def kind_of(name: str, content: Mapping[str, Any], has_ema: bool) -> Kind:
    """What was trained, by what the checkpoint is called and says of itself.

    Args:
        name: Its path where it came from.
        content: What it holds.
        has_ema: Whether it holds the running means of an adaptive model.

    Raises:
        ValueError: If it is called what cannot hold them.
    """
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
            f"{name} is refused: it is called {found}, but holds the adaptive state 'ema_abs_activations'; "
            f"say what it is with kind"
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


def settings_of(
    name: str, content: Mapping[str, Any], state: Mapping[str, Tensor], where: str
) -> dict[str, float]:
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
                f"{where}: it disagrees with itself on {key}: "
                f"{', '.join(f'{v:g} by {s}' for s, v in sources.items())}"
            )
    return {
        key: next(iter(sources.values())) for key, sources in stated.items() if key not in ("d_in", "d_sae")
    }


def checked_k(given: int | None, stated: float | None, d_sae: int, where: str) -> int:
    """``k`` of a TopK model, as given or as the checkpoint says.

    Raises:
        ValueError: If neither says it, they disagree, or it is not in 1 to ``d_sae``.
    """
    if given is not None and stated is not None and given != stated:
        raise ValueError(f"{where}: k={given} was given, but the checkpoint says k={stated:g}")
    k = given if given is not None else stated
    if k is None:
        raise ValueError(
            f"{where}: it is a TopK model, and neither its name nor its content says k: give it (--k)"
        )
    if k != int(k) or not 0 < k <= d_sae:
        raise ValueError(f"{where}: k must be an integer from 1 to d_sae = {d_sae}, got {k:g}")
    return int(k)


def last_metrics(history: Any) -> dict[str, float]:
    """The last value of each number in ``metrics_history``, those that are finite."""
    if isinstance(history, list) and history and isinstance(history[-1], Mapping):
        history = history[-1]
    if not isinstance(history, Mapping):
        return {}
    last = {
        str(key): value[-1] if isinstance(value, list) and value else value for key, value in history.items()
    }
    # JSON has no word for what is not finite
    return {key: float(value) for key, value in last.items() if _is_number(value) and math.isfinite(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
