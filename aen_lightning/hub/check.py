"""Whether weights fit the config beside them, from the file's header: no weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.util import str_to_dtype

from aen_lightning.files import SAFETENSORS_NAMES, read_safetensors_header

_DTYPE_NAMES = {name: str(dtype).removeprefix("torch.") for dtype, name in SAFETENSORS_NAMES.items()}
_IGNORED_BY_SAELENS = ("scaling_factor",)  # ones, in dictionaries saved before version 6


def expected_shapes(cfg: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that SAELens will want for this config, by name.

    Raises:
        ValueError: For an architecture that is not registered, or a config that SAELens refuses.
    """
    cfg = handle_config_defaulting({**cfg, "metadata": dict(cfg.get("metadata") or {})})
    architecture = cfg.get("architecture", "standard")
    if architecture not in SAE_CLASS_REGISTRY:
        raise ValueError(
            f"the config names the architecture {architecture!r}, which this installation does not have; it "
            f"has {', '.join(sorted(SAE_CLASS_REGISTRY))}"
        )
    try:
        sae: SAE[Any] = SAE.from_dict({**cfg, "architecture": architecture, "device": "meta"})
    except (TypeError, KeyError) as error:  # a field is missing or has another type
        raise ValueError(
            f"the config cannot be read as that of a {architecture!r} dictionary: {error}"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}


def check_weights(cfg: dict[str, Any], weights: Path) -> None:
    """Compare names, shapes and dtypes in a safetensors file with its config.

    Args:
        cfg: Content of ``cfg.json``.
        weights: Path of ``sae_weights.safetensors``.

    Raises:
        ValueError: If they disagree, or the file is no safetensors; it says in what.
    """
    wanted = expected_shapes(cfg)
    found = read_safetensors_header(weights)
    shapes = {name: info.shape for name, info in found.items()}
    dtypes = {_DTYPE_NAMES.get(info.dtype, info.dtype) for info in found.values()}
    problems = [f"{name} is missing" for name in wanted if name not in shapes]
    problems += [
        f"{name} does not belong there" for name in shapes if name not in (*wanted, *_IGNORED_BY_SAELENS)
    ]
    problems += [
        f"{name} has shape {shapes[name]} where the config means {shape}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    dtype = str(str_to_dtype(cfg.get("dtype", "float32"))).removeprefix("torch.")
    if dtypes - {dtype}:
        problems.append(f"the weights are {' and '.join(sorted(dtypes))} where the config says {dtype}")
    if problems:
        raise ValueError(f"the weights do not fit their config ({weights}): {'; '.join(problems)}")
