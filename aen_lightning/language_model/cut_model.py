"""Language models to take activations from, cut after the deepest hook.

The base model (no LM head) is built from a config with fewer layers, so that transformers never materialises
the layers above, and the final norm is replaced by the identity, so that ``last_hidden_state`` is the last
block's raw output.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from aen_lightning.compat import with_own_children
from aen_lightning.files import DTYPES, ModelDtype
from aen_lightning.language_model.batch_threads import RowParallel
from aen_lightning.language_model.checkpoint_files import without_upper_layers
from aen_lightning.language_model.hook_points import (
    Hook,
    HookReader,
    after_layers,
    cut_config,
    layers_of,
    layers_path,
    resolve_hook,
)


class ActivationModel(Protocol):
    """What a data module needs of a language model: ``CutModel`` and ``TLModel`` have it."""

    hooks: tuple[Hook, ...]

    @property
    def device(self) -> torch.device:
        """Where ``input_ids`` belong."""

    def activations(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """See ``CutModel.activations``."""


class CutModel:
    """A frozen base model that ends at the deepest hook. Not an ``nn.Module``, so no parent module registers
    it.

    Args:
        model: Base model as ``build_cut_model`` or ``cut_model`` return it: put into eval mode and frozen
            here.
        hooks: What ``activations`` returns, in this order.
        row_parallel: Run parts of a large batch side by side where the model is on a CPU. Not for a model
            whose forward pass cannot be in two places at a time: one that is sharded over ranks, or whose
            weights are moved while it runs.
    """

    def __init__(self, model: PreTrainedModel, hooks: Sequence[Hook], *, row_parallel: bool = True) -> None:
        model.eval()
        model.requires_grad_(False)
        self.model = model
        self.hooks = tuple(hooks)
        self._last = _last_block_output(model)
        moved = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
        self._rows = RowParallel() if row_parallel and not moved else None

    @property
    def device(self) -> torch.device:
        """Where ``input_ids`` belong: the device of the input embedding."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def activations(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """One forward pass.

        Args:
            input_ids: Token ids, (batch, context), moved to the model's device if elsewhere.
            attention_mask: None (every token is real, attention is causal), (batch, context), or what else
                transformers accepts, e.g. (batch, 1, context, context).
            position_ids: None for 0, 1, ...; or (batch, context).

        Returns:
            For each hook, keyed by its ``hook_name``, a tensor (batch, context, d_in) in the model's dtype.
        """
        device = self.device
        ids = input_ids.to(device)
        rest = [None if x is None else x.to(device) for x in (attention_mask, position_ids)]
        n_parts = 1
        if (
            self._rows is not None
            and device.type == "cpu"
            and all(x is None or len(x) == len(ids) for x in rest)
        ):
            n_parts = self._rows.n_parts(ids)
        with self._reader() as reader:

            def run(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> dict[str, Tensor]:
                given = {"attention_mask": mask, "position_ids": positions}
                out = self.model(input_ids=ids, **{k: v for k, v in given.items() if v is not None})
                seen = (
                    reader.take() if reader is not None else {self.hooks[0].hook_name: out.last_hidden_state}
                )
                # OPT flattens (batch, context) before its MLP
                return {h.hook_name: seen[h.hook_name].reshape(*ids.shape, h.d_in) for h in self.hooks}

            if self._rows is None or n_parts == 1:
                return run(ids, *rest)
            parts = self._rows.map(run, n_parts, ids, *rest)
        return {h.hook_name: torch.cat([part[h.hook_name] for part in parts]) for h in self.hooks}

    def _reader(self) -> AbstractContextManager[HookReader | None]:
        """None where the model's own output is the activation."""
        if len(self.hooks) == 1 and self.hooks[0].reads == "output" and self.hooks[0].module == self._last:
            return nullcontext()
        return HookReader(self.model, self.hooks)

    def to(self, device: torch.device | str) -> CutModel:
        """Move the model, in place."""
        nn.Module.to(self.model, device)
        return self


def load_config(
    model_name: str,
    *,
    revision: str | None = None,
    model_from_pretrained_kwargs: dict[str, Any] | None = None,
) -> PretrainedConfig:
    """The config of a model, with what ``model_from_pretrained_kwargs`` says of its place and its attention.

    Raises:
        OSError: If there is no such model, or the Hub cannot be reached; the message names the model.
    """
    passed = (
        "gguf_file", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code", "attn_implementation",
    )  # fmt: skip
    kwargs = {k: v for k, v in (model_from_pretrained_kwargs or {}).items() if k in passed}
    try:
        return AutoConfig.from_pretrained(model_name, revision=revision or "main", **kwargs)
    except OSError as error:
        kind = "no such folder, and on the Hub" if not Path(model_name).exists() else "in that folder"
        reason = " ".join(str(error).split())
        raise OSError(f"the language model {model_name!r} cannot be read ({kind}: {reason})") from error


def resolve_hooks(config: PretrainedConfig, hook_names: Sequence[str]) -> tuple[Hook, ...]:
    """``resolve_hook`` for several names.

    Raises:
        ValueError: If there is none, if one does not exist, or if two name the same activation.
    """
    if not hook_names:
        raise ValueError("at least one hook name is needed, got none")
    hooks = tuple(resolve_hook(config, name) for name in hook_names)
    for i, hook in enumerate(hooks):
        if hook.hook_name in [h.hook_name for h in hooks[:i]]:
            raise ValueError(f"hook names {list(hook_names)} name {hook.hook_name!r} twice: leave one out")
    return hooks


def build_cut_model(config: PretrainedConfig, hooks: Sequence[Hook]) -> PreTrainedModel:
    """The cut base model without its weights: random, or none at all under ``torch.device("meta")``.

    Args:
        config: Of the whole model.
        hooks: Resolved on that config; the deepest says where to cut.
    """
    return _end_at_last_block(AutoModel.from_config(cut_config(config, max(h.layer for h in hooks))))


def load_cut_model(
    model_name: str,
    hook_names: Sequence[str],
    *,
    revision: str | None = None,
    dtype: ModelDtype = "float32",
    device: torch.device | str = "cpu",
    model_from_pretrained_kwargs: dict[str, Any] | None = None,
) -> CutModel:
    """Load the part of a Hugging Face model that the hooks need.

    Layers above the deepest hook, the final norm and the LM head are not read.

    Args:
        model_name: Hub name or folder.
        hook_names: See ``resolve_hook``.
        revision: Branch, tag or commit on the Hub.
        dtype: Of weights and activations.
        device: Where to put it; ignored if the kwargs have a ``device_map``.
        model_from_pretrained_kwargs: Passed on to ``AutoModel.from_pretrained``: ``device_map``,
            ``quantization_config``, ``attn_implementation``, ``gguf_file``, ...

    Raises:
        ValueError: For a hook that does not exist, a keyword that has an argument of its own here, or a
            checkpoint that lacks weights of the layers needed.
    """
    kwargs = dict(model_from_pretrained_kwargs or {})
    for name, instead in (
        ("dtype", "dtype"),
        ("torch_dtype", "dtype"),
        ("revision", "revision"),
        ("config", None),
    ):
        if name in kwargs:
            hint = f"use the argument {instead!r}" if instead else "the config is made here"
            raise ValueError(f"model_from_pretrained_kwargs cannot hold {name!r}: {hint}")
    if dtype not in DTYPES:
        raise ValueError(f"model dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    config = load_config(model_name, revision=revision, model_from_pretrained_kwargs=kwargs)
    hooks = resolve_hooks(config, hook_names)
    deepest, at = max(h.layer for h in hooks), revision or "main"
    with (
        without_upper_layers(model_name, config, deepest, revision=at, kwargs=kwargs) as source,
        _unread_weights_are_no_news(),
    ):
        model, info = AutoModel.from_pretrained(
            source, config=cut_config(config, deepest), revision=at, dtype=DTYPES[dtype], output_loading_info=True,
            **kwargs,
        )  # fmt: skip
    model.name_or_path = model.config.name_or_path = model_name
    unread = tuple(f"{path}." for path in after_layers(model))
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(unread)):
        raise ValueError(
            f"the checkpoint {model_name!r} lacks {len(missing)} weights that "
            f"{[h.hook_name for h in hooks]} need, "
            f"e.g. {missing[0]!r}: it is not a complete checkpoint of a {config.model_type} model"
        )
    if kwargs.get("device_map") is None and not getattr(model, "is_quantized", False):
        model = model.to(device)
    return CutModel(_end_at_last_block(model), hooks)


def cut_model(model: PreTrainedModel, hook_names: Sequence[str]) -> CutModel:
    """Cut a model that is already in memory. Weights are shared; the given model keeps its layers and head.

    Args:
        model: A causal LM or its base model. It is frozen and put into eval mode, since its blocks are the
            same.
        hook_names: See ``resolve_hook``.
    """
    hooks = resolve_hooks(model.config, hook_names)
    base: Any = with_own_children(model.base_model)
    path = layers_path(base.config)
    for owner in _copy_path(base, path):
        owner.config = cut_config(model.config, max(h.layer for h in hooks))
    owner_name, _, attribute = path.rpartition(".")
    kept = layers_of(base)[: max(h.layer for h in hooks) + 1]
    setattr(base.get_submodule(owner_name), attribute, kept)
    return CutModel(_end_at_last_block(base), hooks)


def _last_block_output(base: PreTrainedModel) -> str | None:
    """Path of the block whose output is ``last_hidden_state``, or None if the model may still change it."""
    if not (paths := after_layers(base)):
        return None
    if not all(isinstance(base.get_submodule(p), nn.Identity) for p in paths):
        return None
    return f"{layers_path(base.config)}.{len(layers_of(base)) - 1}"


def _end_at_last_block(base: PreTrainedModel) -> PreTrainedModel:
    for path in after_layers(base):
        owner, _, attribute = path.rpartition(".")
        setattr(base.get_submodule(owner), attribute, nn.Identity())
    return base


def _copy_path(root: nn.Module, path: str) -> Iterator[Any]:
    """``root`` (itself such a copy) and each owner on ``path``, copied with the children it has."""
    yield root
    head, _, rest = path.partition(".")
    if rest:
        child = with_own_children(root.get_submodule(head))
        setattr(root, head, child)
        yield from _copy_path(child, rest)


@contextmanager
def _unread_weights_are_no_news() -> Iterator[None]:
    """Hold back transformers' table of unused weights (all that was cut off), unless loading fails."""
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" in str(record.msg):
            held.append(record)
            return False
        return True

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(hold)
    try:
        yield
    except Exception:
        logger.removeFilter(hold)
        for record in held:
            logger.handle(record)
        raise
    finally:
        logger.removeFilter(hold)
