"""What of a dictionary's own metadata is acted on: a stranger wrote it, and may not have this machine run code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import create_model

from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.files.checked import OURS, check, shortened

_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# where and how the trainer loaded the model, which changes nothing that it computes here
_IGNORED = (
    "device_map", "max_memory", "low_cpu_mem_usage", "torch_dtype", "dtype", "token", "use_auth_token", "cache_dir",
    "local_files_only", "force_download", "offload_folder", "offload_state_dict", "use_safetensors", "proxies",
    "revision",
)  # fmt: skip
_MAX_SYNTHETIC_BYTES = 16 * 2**30
_NOT_PARAMETERS = ("_class_path", "_instantiator")  # LightningCLI's, in dictionaries of earlier versions


def language_model_kwargs(
    metadata: Any, *, given: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """What to load a dictionary's language model with.

    Of what the metadata asks for, ``attn_implementation`` (one of transformers' own), ``subfolder``,
    ``variant`` and ``gguf_file`` are followed, whatever only says how the trainer loaded the model is left
    out, and all else must be given by the user: it could run code, write files or change the numbers.

    Args:
        metadata: Of the dictionary, as SAELens holds it.
        given: What the user asks for, instead of all that the metadata says.
        trust_remote_code: Whether the user lets code of the model's repository run.

    Returns:
        Keyword arguments of ``from_pretrained``; ``trust_remote_code`` is always among them, as transformers
        would ask on the terminal otherwise.

    Raises:
        ValueError: If the metadata asks for more; it says for what. Also if TransformerLens changed the
            weights so that its activations are others than those of the Hugging Face model.
    """
    if given is not None:
        return {"trust_remote_code": trust_remote_code, **given}
    asked = dict(metadata["model_from_pretrained_kwargs"] or {})
    if metadata["model_class_name"] != "AutoModelForCausalLM":
        _refuse_other_activations(asked)
        asked = {}  # of a TransformerLens model; they are not those of a Hugging Face one
    followed: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    for name, value in asked.items():
        if name == "trust_remote_code":
            if value and not trust_remote_code:
                raise ValueError(
                    f"the dictionary asks to run code from the repository of its model "
                    f"{shortened(metadata['model_name'])} (trust_remote_code): read that code, and give "
                    "--trust_remote_code if you trust it"
                )
        elif _is_harmless(name, value):
            followed[name] = value
        elif name not in _IGNORED and value is not None and value is not False:
            raise ValueError(
                f"the dictionary asks to load its language model with {shortened(name)} = {shortened(value)}, "
                "which only you may: give --model_from_pretrained_kwargs '{...}' with it, or '{}' to do without"
            )
    return followed


def _is_harmless(name: str, value: Any) -> bool:
    if name == "attn_implementation":  # any other would be fetched from the Hub as a kernel, and run
        return value in _ATTENTION
    plain = isinstance(value, str) and len(value) <= 200 and value.isprintable()
    if name == "subfolder":
        return plain and not value.startswith(("/", "~", "\\")) and ".." not in value and ":" not in value
    return name in ("variant", "gguf_file") and plain and not set(value) & set("/\\:~") and ".." not in value


def _refuse_other_activations(asked: Mapping[str, Any]) -> None:
    if changed := [k for k in ("center_writing_weights", "fold_value_biases") if asked.get(k)]:
        raise ValueError(
            f"the dictionary was trained on activations of a TransformerLens model with {changed[0]}, "
            "which are not "
            "those of the Hugging Face model: harvest them with SAELens's CacheActivationsRunner and give "
            "--shards"
        )


def synthetic_data(parameters: Mapping[str, Any], *, d_in: int, n_samples: int) -> SpikedDataModule:
    """The distribution that a dictionary says it was trained on, if it can be that and fits into memory.

    Raises:
        ValueError: If a parameter is unknown or out of its type, the width is another than the dictionary's,
            or samples would take more than 16 GiB.
    """
    where = "the dictionary's metadata: synthetic_data"
    kept = {name: value for name, value in parameters.items() if name not in _NOT_PARAMETERS}
    checked = check(_parameters_of(SpikedDataModule), kept, where).model_dump()
    if checked["d_in"] != d_in:
        raise ValueError(f"{where}: d_in is {checked['d_in']}, and the dictionary's is {d_in}")
    n_bytes = 4 * checked["n_features"] * (2 * n_samples + 2 * d_in)
    if n_bytes > _MAX_SYNTHETIC_BYTES:
        raise ValueError(
            f"{where}: {n_samples} samples of {checked['n_features']} features take {n_bytes >> 30} GiB"
        )
    return SpikedDataModule(**checked)


def _parameters_of(source: type) -> Any:
    """The form of a constructor's arguments, as its signature says them."""
    hints = get_type_hints(source.__init__)  # type: ignore[misc]
    parameters = list(inspect.signature(source).parameters.values())
    fields: dict[str, Any] = {p.name: (hints[p.name], p.default) for p in parameters}
    return create_model(source.__name__, __config__=OURS, **fields)
