"""Where in a language model an activation is read: TransformerLens names, Hugging Face module paths, and
their meaning.

Everything here works from a model's *config*; no weight is read. A TransformerLens name means what
TransformerLens caches under it for the same weights; the tests check every name of every family against it.
"""

from __future__ import annotations

import difflib
import inspect
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from aen_lightning.language_model.families import (
    BY_MODEL_TYPE,
    FAMILIES,
    base_prefix,
    cut_config,
    layers_path,
    n_layers,
)

Reads = Literal["output", "input"]


@dataclass(frozen=True)
class Hook:
    """One place to read activations of shape (batch, context, d_in).

    Args:
        hook_name: The TransformerLens name where one exists (``blocks.16.hook_resid_post``), else
            ``hf_hook_name``.
        hf_hook_name: Module of the ``AutoModelForCausalLM`` whose *output* is this activation
            (``model.layers.16``), as SAELens's ``hf_hook_name`` metadata; None where no module outputs it.
        layer: Index of the deepest decoder block that has to run.
        d_in: Width of the activation.
        module: Path of the module to read in the *base* model (``AutoModel``), e.g. ``layers.16``.
        reads: Whether the activation is that module's ``output`` (first element of a tuple) or first
            ``input``.
    """

    hook_name: str
    hf_hook_name: str | None
    layer: int
    d_in: int
    module: str
    reads: Reads = "output"


_BLOCK_HOOKS = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z",
    "mlp.hook_post",
)  # fmt: skip
# TransformerLens 3 names a bridge's hook points by component; these are the same tensors.
_ALIASES = {"hook_out": "hook_resid_post", "hook_in": "hook_resid_pre"}


def _d_mlp(config: PretrainedConfig) -> int:
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if isinstance(width := getattr(config, name, None), int):
            return width
    return 4 * int(config.hidden_size)  # GPT-2's n_inner: None


def _refusal(config: PretrainedConfig, kind: str) -> str | None:
    """Why a family has no such hook point, or None if it has."""
    if kind == "hook_resid_mid" and getattr(config, "use_parallel_residual", False):
        return "attention and MLP are parallel in it (use_parallel_residual), so nothing lies between them"
    if kind == "hook_resid_mid" and config.model_type == "opt" and not config.do_layer_norm_before:
        return "its norms come after attention and MLP (do_layer_norm_before=False), so no norm reads it"
    return None


def _block_hook(config: PretrainedConfig, kind: str, layer: int) -> Hook:
    """The hook point ``blocks.{layer}.{kind}`` of a known family; layer and kind are valid."""
    family, prefix = BY_MODEL_TYPE[config.model_type], base_prefix(config)
    d_model, block = int(config.hidden_size), f"{family.layers}.{layer}"
    head_dim = getattr(config, "head_dim", None) or d_model // config.num_attention_heads
    name = f"blocks.{layer}.{kind}"

    def output(module: str, at: int = layer) -> Hook:
        return Hook(name, f"{prefix}.{module}", at, d_model, module)

    if kind == "hook_resid_post":
        return output(block)
    if kind == "hook_resid_pre":
        if layer > 0:  # the same tensor as the block before puts out, which spares a block
            return output(f"{family.layers}.{layer - 1}", layer - 1)
        hf_name = None if family.first_input is None else f"{prefix}.{family.first_input}"
        return Hook(name, hf_name, 0, d_model, block, "input")
    if kind == "hook_resid_mid":
        return Hook(name, None, layer, d_model, f"{block}.{family.mid}", "input")
    if kind == "hook_attn_out":
        return output(f"{block}.{family.attn_out}")
    if kind == "hook_mlp_out":
        return output(f"{block}.{family.mlp_out}")
    if kind == "attn.hook_z":
        d_in = int(config.num_attention_heads) * int(head_dim)
        return Hook(name, None, layer, d_in, f"{block}.{family.attn_proj}", "input")
    return Hook(name, None, layer, _d_mlp(config), f"{block}.{family.mlp_proj}", "input")


def known_hooks(config: PretrainedConfig) -> dict[str, Hook]:
    """Every TransformerLens hook point of a known family, shallowest first; empty for other families."""
    if config.model_type not in BY_MODEL_TYPE:
        return {}
    hooks: dict[str, Hook] = {}
    embed, d_embed = (
        BY_MODEL_TYPE[config.model_type].embed,
        getattr(config, "word_embed_proj_dim", config.hidden_size),
    )
    hooks["hook_embed"] = Hook("hook_embed", f"{base_prefix(config)}.{embed}", 0, int(d_embed), embed)
    for layer in range(n_layers(config)):
        for kind in _BLOCK_HOOKS:
            if _refusal(config, kind) is None:
                hooks[f"blocks.{layer}.{kind}"] = _block_hook(config, kind, layer)
    return hooks


def resolve_hook(config: PretrainedConfig, hook_name: str) -> Hook:
    """Find a hook point in a model known only by its config.

    Args:
        config: Of the whole model, e.g. ``AutoConfig.from_pretrained(...)``.
        hook_name: A TransformerLens name: ``hook_embed`` or ``blocks.L.`` followed by ``hook_resid_pre``
            (``hook_in``), ``hook_resid_mid``, ``hook_resid_post`` (``hook_out``), ``hook_attn_out``,
            ``hook_mlp_out``, ``attn.hook_z`` (heads flattened), ``mlp.hook_post``; or the path of a module of
            ``AutoModelForCausalLM``, whose output is taken, e.g. ``model.layers.16`` or
            ``transformer.h.3.mlp``. TransformerLens names work for the families in ``FAMILIES``, module paths
            for any decoder whose blocks can be found.

    Returns:
        The hook point. Its ``hook_name`` is the TransformerLens name even if a module path was given, where
        one exists.

    Raises:
        ValueError: If the model has no such hook point; the message names near and valid ones.
    """
    n_layers(config)  # refuses what is not a text decoder
    known = known_hooks(config)
    canonical = re.sub(
        r"^(blocks\.\d+\.)(hook_out|hook_in)$", lambda m: m.group(1) + _ALIASES[m.group(2)], hook_name
    )
    if canonical in known:
        return known[canonical]
    if canonical.startswith(("blocks.", "hook_")):
        raise ValueError(_no_such_hook(config, hook_name, canonical, known))
    by_path = [h for h in known.values() if h.hf_hook_name == hook_name]
    if (
        by_path
    ):  # resid_pre shares its module with the block below, or the embedding; the latter are the usual names
        return min(by_path, key=lambda hook: hook.hook_name.endswith("hook_resid_pre"))
    return _module_hook(config, hook_name, known)


def _no_such_hook(config: PretrainedConfig, asked: str, canonical: str, known: dict[str, Hook]) -> str:
    if not known:
        return (
            f"TransformerLens names such as {asked!r} are known for {', '.join(FAMILIES)}; for a model of "
            f"type {config.model_type!r} give the path of a module of AutoModelForCausalLM, e.g. "
            "'model.layers.16'"
        )
    n = n_layers(config)
    if (match := re.match(r"blocks\.(\d+)\.(.+)$", canonical)) and match.group(2) in _BLOCK_HOOKS:
        if int(match.group(1)) >= n:
            return (
                f"hook point {asked!r} does not exist: the model has {n} layers, so blocks.0 to "
                f"blocks.{n - 1}"
            )
        why = _refusal(config, match.group(2))
        return f"hook point {asked!r} does not exist in a {config.model_type} model: {why}"
    near = difflib.get_close_matches(canonical, known, n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    kinds = [kind for kind in _BLOCK_HOOKS if _refusal(config, kind) is None]
    return (
        f"hook point {asked!r} does not exist in a {config.model_type} model with {n} layers.{hint} Valid: "
        f"hook_embed, blocks.L.{{{', '.join(kinds)}}} for L from 0 to {n - 1}, or a module path such as "
        f"{known[f'blocks.{n // 2}.hook_attn_out'].hf_hook_name!r}"
    )


def _module_hook(config: PretrainedConfig, path: str, known: dict[str, Hook]) -> Hook:
    """A hook point on any module's output, its width found by a forward pass on the meta device (no memory,
    no weights)."""
    prefix, n = base_prefix(config), n_layers(config)
    relative = path.removeprefix(f"{prefix}.")
    digits = re.search(r"(?:^|\.)(\d+)(?:\.|$)", relative)
    layer = int(digits.group(1)) if digits else 0
    if layer >= n:
        raise ValueError(
            f"hook point {path!r} does not exist: the model has {n} layers, numbered 0 to {n - 1}"
        )
    with torch.device("meta"):
        base = AutoModel.from_config(cut_config(config, layer)).eval()
    modules = dict(base.named_modules())
    if path == relative or relative not in modules:
        candidates = [f"{prefix}.{m}" for m in modules if m] + list(known)
        near = difflib.get_close_matches(path, candidates, n=3)
        raise ValueError(
            f"hook point {path!r} does not exist in a {config.model_type} model with {n} layers (paths are "
            "those of AutoModelForCausalLM, without its LM "
            f"head).{' Did you mean ' + ', '.join(near) + '?' if near else ''}"
        )
    blocks = layers_path(config)
    if (
        not relative.startswith(f"{blocks}.")
        and base.get_submodule(relative) is not base.get_input_embeddings()
    ):
        raise ValueError(
            f"hook point {path!r} lies outside the decoder blocks {prefix}.{blocks}.0 to .{n - 1}"
        )
    if relative == f"{blocks}.{layer}" and isinstance(width := getattr(config, "hidden_size", None), int):
        return Hook(path, path, layer, width, relative)
    probe = Hook(path, path, layer, 0, relative)
    inputs = {
        "input_ids": torch.zeros(2, 3, dtype=torch.long, device="meta"),
        "position_ids": torch.zeros(2, 3, dtype=torch.long, device="meta"),
        # a ready-made mask: transformers would look at values to make one, and meta tensors have none
        "attention_mask": torch.zeros(2, 1, 3, 3, device="meta"),
    }
    accepted = inspect.signature(base.forward).parameters
    try:
        with torch.no_grad(), HookReader(base, [probe]) as reader:
            base(**{k: v for k, v in inputs.items() if k in accepted})
            seen = reader.take()
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as err:
        raise ValueError(
            f"cannot tell the width of {path!r} in a {config.model_type} model without its weights: choose "
            f"another hook (supported families: {', '.join(FAMILIES)})"
        ) from err
    shape = tuple(seen[path].shape) if path in seen else None
    if shape is None or len(shape) not in (2, 3) or (shape[:2] != (2, 3) and shape[0] != 6):
        raise ValueError(
            f"hook point {path!r} gives {'nothing' if shape is None else f'shape {shape}'} for 2 prompts of "
            "3 tokens, expected one vector a token: choose a module that outputs (batch, context, d_in)"
        )
    return Hook(path, path, layer, shape[-1], relative)


class HookReader:
    """Context manager: while open, forward passes of ``model`` leave the activations of ``hooks`` to be
    taken.

    Each thread sees those of its own forward passes.
    """

    def __init__(self, model: nn.Module, hooks: Sequence[Hook]) -> None:
        self.model, self.hooks = model, hooks
        self._handles: list[Any] = []
        self._seen = _OfThread()

    def __enter__(self) -> HookReader:
        for hook in self.hooks:
            module, name = self.model.get_submodule(hook.module), hook.hook_name
            if hook.reads == "output":

                def read(_module: nn.Module, _args: Any, out: Any, name: str = name) -> None:
                    # transformers 5 blocks return a tensor, attention modules a tuple
                    self._store(name, out[0] if isinstance(out, tuple) else out)

                self._handles.append(module.register_forward_hook(read))
            else:

                def read_input(
                    _module: nn.Module, args: Any, kwargs: dict[str, Any], name: str = name
                ) -> None:
                    self._store(name, args[0] if args else kwargs.get("hidden_states"))

                self._handles.append(module.register_forward_pre_hook(read_input, with_kwargs=True))
        return self

    def take(self) -> dict[str, Tensor]:
        """The activations of this thread's last forward pass by hook name, as the modules gave them;
        forgotten here."""
        seen, self._seen.activations = self._seen.activations, {}
        return seen

    def _store(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self._seen.activations[name] = value

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.activations: dict[str, Tensor] = {}
