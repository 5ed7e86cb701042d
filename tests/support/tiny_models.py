"""Tiny random language models and a word-level tokenizer, made on the spot: no network, a few thousand
weights.

model = tiny_model("gemma2")                      # AutoModelForCausalLM, random, seeded, eval mode
folder = save_tiny_model("llama", tmp_path)       # the same with a tokenizer, as a Hugging Face folder
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging

logging.getLogger("transformers").setLevel(logging.ERROR)
hf_logging.disable_progress_bar()

VOCAB_SIZE = 64
BOS, EOS, PAD = 0, 1, 2  # <s>, </s>, <pad>; then <unk> and the words w4 ... w63
D_MODEL, N_LAYERS, MAX_POSITIONS = 16, 4, 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 2,
    "max_position_embeddings": MAX_POSITIONS, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
_GATED = {**_COMMON, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 12}
_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {**_COMMON, "n_inner": 24},
    "gpt_neox": {**_COMMON, "intermediate_size": 24},
    "gpt_neox_sequential": {**_COMMON, "intermediate_size": 24, "use_parallel_residual": False},
    "llama": _GATED,
    "mistral": {**_GATED, "sliding_window": None},
    "qwen2": {k: v for k, v in _GATED.items() if k != "head_dim"},
    "qwen3": _GATED,
    "gemma": _GATED,
    "gemma2": {**_GATED, "sliding_window": 4, "query_pre_attn_scalar": 12},
    "gemma3_text": {**_GATED, "sliding_window": 4, "query_pre_attn_scalar": 12},
    "opt": {**_COMMON, "ffn_dim": 24, "word_embed_proj_dim": D_MODEL},
    "opt_projected": {**_COMMON, "ffn_dim": 24, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
}
FAMILIES = tuple(_FAMILIES)


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """Config of a tiny model; ``family`` is one of ``FAMILIES``."""
    model_type = family.removesuffix("_sequential").removesuffix("_projected")
    config = AutoConfig.for_model(model_type, **{**_FAMILIES[family], **overrides})
    config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    return config


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A causal LM in float32, all of its weights random, norms and biases too, so that no part is an
    identity.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(0.0, 0.3)
                if parameter.ndim == 1 and name.endswith("weight") and "gemma" not in family:
                    parameter.add_(1.0)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words ``w4`` to ``w63`` are tokens 4 to 63; nothing is prepended."""
    vocab = {"<s>": BOS, "</s>": EOS, "<pad>": PAD, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_tiny_model(
    family: str, folder: Path, *, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any
) -> str:
    """Save ``tiny_model`` and ``tiny_tokenizer`` as a Hugging Face folder and return its path."""
    path = folder / family
    tiny_model(family, seed=seed, **overrides).save_pretrained(path, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(path)
    return str(path)
