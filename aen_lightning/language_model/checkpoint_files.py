"""Which files of a checkpoint a cut model needs, and under which keys its weights lie there."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from aen_lightning.compat import find_in_repository
from aen_lightning.files import write_json
from aen_lightning.files.checked import FileName, Foreign, Word, read_checked
from aen_lightning.language_model.families import after_layers_paths, base_prefix, layers_path

_HUB_KWARGS = ("token", "cache_dir", "local_files_only", "force_download")


class _Index(Foreign):
    weight_map: dict[Word, FileName]


def read_weight_map(index: Path) -> dict[str, str]:
    """Weight name to file name, of a checkpoint's index file.

    Raises:
        ValueError: If it is none, or names a file outside of the checkpoint.
    """
    return read_checked(index, _Index).weight_map


def checkpoint_keys(base_model: PreTrainedModel, available: Collection[str]) -> dict[str, str]:
    """Where a checkpoint keeps the weights of a (cut) base model.

    Args:
        base_model: E.g. from ``build_cut_model`` on the meta device.
        available: All keys of the checkpoint, saved from the causal LM (``model.layers.0...``) or the base
            model.

    Returns:
        For every entry of the base model's state dict, its key in the checkpoint.

    Raises:
        ValueError: If a weight is in the checkpoint under neither name.
    """
    keys, found = set(available), {}
    for name in base_model.state_dict():
        candidates = (f"{base_model.base_model_prefix}.{name}", name)
        key = next((c for c in candidates if c in keys), None)
        if key is None:
            raise ValueError(f"the checkpoint has neither {candidates[0]!r} nor {candidates[1]!r}")
        found[name] = key
    return found


def needed_files(config: PretrainedConfig, layer: int, weight_map: dict[str, str]) -> list[str]:
    """Names of the files of a checkpoint that hold anything but blocks above ``layer``, the final norm and
    the LM head.

    Args:
        config: Of the whole model.
        layer: Index of the deepest block needed.
        weight_map: Of the checkpoint's index file: weight name to file name.
    """
    prefix = f"{base_prefix(config)}."
    block = re.compile(rf"^{re.escape(layers_path(config))}\.(\d+)\.")
    unused = ("lm_head.", *(f"{path}." for path in after_layers_paths(config)))

    def needed(key: str) -> bool:
        name = key.removeprefix(prefix)
        match = block.match(name)
        return int(match.group(1)) <= layer if match else not name.startswith(unused)

    return sorted({file for key, file in weight_map.items() if needed(key)})


@contextmanager
def without_upper_layers(
    model_name: str, config: PretrainedConfig, layer: int, *, revision: str, kwargs: dict[str, Any]
) -> Iterator[str]:
    """A stand-in for ``model_name`` without the files that hold only layers above ``layer``: never fetched or
    opened.

    Yields ``model_name`` itself where there is nothing to leave out: a checkpoint in one file, or not in
    safetensors.
    """
    unusual = {"gguf_file", "subfolder", "variant", "use_safetensors", "state_dict"} & kwargs.keys()
    hub = {"revision": revision} | {k: v for k, v in kwargs.items() if k in _HUB_KWARGS}
    index_file = None if unusual else find_in_repository(model_name, SAFE_WEIGHTS_INDEX_NAME, **hub)
    if index_file is None:
        yield model_name
        return
    weight_map = read_weight_map(index_file)
    files = needed_files(config, layer, weight_map)
    if len(files) == len(set(weight_map.values())):
        yield model_name
        return
    with TemporaryDirectory(prefix="aen-checkpoint-") as folder:
        for file in files:
            source = cached_file(model_name, file, **hub)
            assert (
                source is not None
            )  # cached_file raises for a file that the index names and the repository lacks
            (Path(folder) / file).symlink_to(Path(source).resolve())
        index = {"metadata": {}, "weight_map": {k: f for k, f in weight_map.items() if f in files}}
        write_json(Path(folder) / SAFE_WEIGHTS_INDEX_NAME, index)
        config.save_pretrained(folder)
        yield folder
