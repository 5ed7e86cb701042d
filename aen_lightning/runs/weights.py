"""Whether a dictionary's config and the weights beside it are what they should be: a stranger wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.util import str_to_dtype

from aen_lightning.files import SAFETENSORS_NAMES, read_safetensors_header, require_finite_file
from aen_lightning.files.checked import Count, Flag, Foreign, Number, Size, Text, Word, check, shortened
from aen_lightning.saes.metadata import Metadata, version_number
from aen_lightning.spelling import printable

_DTYPE_NAMES = {name: str(dtype).removeprefix("torch.") for dtype, name in SAFETENSORS_NAMES.items()}
FOREIGN_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""What SAELens raises, here and there, for a config or weights that it cannot use."""
_IGNORED_BY_SAELENS = ("scaling_factor",)  # ones, in dictionaries saved before version 6


class DictionaryConfig(Foreign):
    """``cfg.json`` of SAELens, of version 6 and before, as far as it is read here or decides what is allocated.

    Other keys are those of an architecture, whose config class checks them.
    """

    d_in: Annotated[Size, Field(le=2**20)]
    d_sae: Size
    architecture: Word = "standard"
    dtype: Word = "float32"
    device: Word | None = None
    apply_b_dec_to_input: Flag | None = None
    normalize_activations: Text | Flag | None = None
    reshape_activations: Text | None = None
    k: Number | None = None
    activation_fn_kwargs: dict[str, Any] | None = None
    sae_lens_version: Text | None = None
    model_name: Text | None = None
    hook_name: Text | None = None
    hook_layer: Count | None = None
    metadata: Metadata | None = None

    @field_validator("sae_lens_version")
    @classmethod
    def _is_version(cls, value: str | None) -> str | None:
        return version_number(value)


def check_config(cfg: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """``cfg`` as it is, if it can be the config of a dictionary.

    Raises:
        ValueError: If it cannot; names ``where``, the field, and what was expected.
    """
    if missing := [key for key in ("d_in", "d_sae") if key not in cfg]:
        raise ValueError(
            f"{where} is not the config of a SAELens dictionary: it has no {' and no '.join(missing)}"
        )
    check(DictionaryConfig, cfg, where)
    return cfg


def expected_shapes(cfg: dict[str, Any], where: str | Path = SAE_CFG_FILENAME) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that SAELens will want for this config, by name.

    Raises:
        ValueError: For an architecture that is not registered, or a config that SAELens refuses.
    """
    try:
        # copied: it writes
        cfg = handle_config_defaulting({**cfg, "metadata": dict(cfg.get("metadata") or {})})
        architecture = cfg.get("architecture", "standard")
        if architecture in SAE_CLASS_REGISTRY:
            sae: SAE[Any] = SAE.from_dict({**cfg, "architecture": architecture, "device": "meta"})
    except FOREIGN_ERRORS as error:  # a field is missing or has another type
        raise ValueError(
            f"{where}: the config cannot be read as that of a {shortened(cfg.get('architecture', 'standard'))} dictionary: "
            f"{printable(str(error), at_most=300)}"
        ) from error
    if architecture not in SAE_CLASS_REGISTRY:
        raise ValueError(
            f"{where}: the config names the architecture {shortened(architecture)}, which this installation does not have; it "
            f"has {', '.join(sorted(SAE_CLASS_REGISTRY))}"
        )
    return {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}


def check_weights(cfg: dict[str, Any], weights: Path, *, where: str | Path | None = None) -> None:
    """Compare names, shapes and dtypes in a safetensors file with its config, and see that all is finite.

    Args:
        cfg: Content of ``cfg.json``.
        weights: Path of ``sae_weights.safetensors``.
        where: Of the config, for the message; None: beside the weights.

    Raises:
        ValueError: If they disagree, the file is no safetensors, or a number in it is not finite; it says
            in what.
    """
    wanted = expected_shapes(cfg, where or weights.with_name(SAE_CFG_FILENAME))
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
    require_finite_file(weights)
