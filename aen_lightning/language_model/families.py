"""How families of language models name their parts, and the config of a model that is cut; no weight is read."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING


@dataclass(frozen=True)
class Family:
    """Module names of one architecture family, relative to the base model or to a block."""

    layers: str
    embed: str
    first_input: str | None  # module whose output enters block 0
    attn: str
    attn_out: (
        str  # module whose output TransformerLens calls hook_attn_out (after a post-norm, if there is one)
    )
    attn_proj: str  # its input is hook_z, heads flattened
    mlp_out: str
    mlp_proj: str  # its input is mlp.hook_post
    mid: str  # norm whose input is hook_resid_mid
    after_layers: tuple[
        str, ...
    ]  # replaced by Identity, so that last_hidden_state is the last block's output


_LLAMA = Family(
    layers="layers", embed="embed_tokens", first_input="embed_tokens", attn="self_attn", attn_out="self_attn",
    attn_proj="self_attn.o_proj", mlp_out="mlp", mlp_proj="mlp.down_proj", mid="post_attention_layernorm",
    after_layers=("norm",),
)  # fmt: skip
_GEMMA2 = Family(
    layers="layers", embed="embed_tokens", first_input="embed_tokens", attn="self_attn",
    attn_out="post_attention_layernorm", attn_proj="self_attn.o_proj", mlp_out="post_feedforward_layernorm",
    mlp_proj="mlp.down_proj", mid="pre_feedforward_layernorm", after_layers=("norm",),
)  # fmt: skip
BY_MODEL_TYPE: dict[str, Family] = {
    "gpt2": Family(
        layers="h", embed="wte", first_input="drop", attn="attn", attn_out="attn", attn_proj="attn.c_proj",
        mlp_out="mlp", mlp_proj="mlp.c_proj", mid="ln_2", after_layers=("ln_f",),
    ),
    "gpt_neox": Family(
        layers="layers", embed="embed_in", first_input="emb_dropout", attn="attention", attn_out="attention",
        attn_proj="attention.dense", mlp_out="mlp", mlp_proj="mlp.dense_4h_to_h",
        mid="post_attention_layernorm",
        after_layers=("final_layer_norm",),
    ),
    "opt": Family(
        layers="decoder.layers", embed="decoder.embed_tokens", first_input=None, attn="self_attn",
        attn_out="self_attn", attn_proj="self_attn.out_proj", mlp_out="fc2", mlp_proj="fc2",
        mid="final_layer_norm",
        after_layers=("decoder.final_layer_norm", "decoder.project_out"),
    ),
    "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gemma": _LLAMA,
    "gemma2": _GEMMA2, "gemma3_text": _GEMMA2,
}  # fmt: skip
FAMILIES: tuple[str, ...] = tuple(BY_MODEL_TYPE)


def n_layers(config: PretrainedConfig) -> int:
    """Number of decoder blocks of a text model."""
    n = getattr(config, "num_hidden_layers", None)
    if not isinstance(n, int):
        raise ValueError(
            f"a config of type {config.model_type!r} states no num_hidden_layers: give a text-only decoder "
            f"model (supported families: {', '.join(FAMILIES)})"
        )
    return n


def base_prefix(config: PretrainedConfig) -> str:
    """Attribute of the CausalLM class that holds the base model (``model``, ``transformer``,
    ``gpt_neox``)."""
    if type(config) not in MODEL_MAPPING:
        raise ValueError(
            f"transformers has no AutoModel for a config of type {config.model_type!r}; "
            f"supported families: {', '.join(FAMILIES)}"
        )
    found: Any = MODEL_MAPPING[type(config)]
    model_class = found[0] if isinstance(found, tuple) else found
    return str(model_class.base_model_prefix)


def cut_config(config: PretrainedConfig, layer: int) -> PretrainedConfig:
    """A copy of ``config`` with blocks 0 to ``layer`` only, per-layer lists cut to match, and no KV cache."""
    n = n_layers(config)
    if not 0 <= layer < n:
        raise ValueError(f"layer must be from 0 to {n - 1} (the model has {n} layers), got {layer}")
    cut = copy.deepcopy(config)
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list) and len(value) == n:
            setattr(cut, name, value[: layer + 1])
    cut.num_hidden_layers = layer + 1
    cut.use_cache = False
    return cut


def layers_path(config: PretrainedConfig) -> str:
    """Path of the list of decoder blocks in the base model, e.g. ``layers`` or ``decoder.layers``.

    Raises:
        ValueError: If it cannot be told which list that is.
    """
    if (family := BY_MODEL_TYPE.get(config.model_type)) is not None:
        return family.layers
    with torch.device("meta"):
        base = AutoModel.from_config(cut_config(config, 0))
    found = [name for name, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 1]
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise ValueError(
            f"cannot tell the decoder blocks of a {config.model_type!r} model, candidates: "
            f"{outermost or 'none'}; supported families: {', '.join(FAMILIES)}"
        )
    return outermost[0]


def layers_of(base_model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder blocks of a base model, cut or whole; errors as ``layers_path``."""
    layers = base_model.get_submodule(layers_path(base_model.config))
    assert isinstance(layers, nn.ModuleList)
    return layers


def after_layers_paths(config: PretrainedConfig) -> tuple[str, ...]:
    """Paths that a family has for modules applied after the last block; empty for families not in
    ``FAMILIES``."""
    family = BY_MODEL_TYPE.get(config.model_type)
    return () if family is None else family.after_layers


def after_layers(base_model: PreTrainedModel) -> tuple[str, ...]:
    """Paths of the modules that a base model has and applies after its last block, e.g. ``("norm",)``."""
    owners = [(path, *path.rpartition(".")) for path in after_layers_paths(base_model.config)]
    # OPT has some of them only in some sizes, and None in the others
    return tuple(
        path for path, owner, _, name in owners if getattr(base_model.get_submodule(owner), name) is not None
    )
