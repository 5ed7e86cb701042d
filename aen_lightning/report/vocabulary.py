"""The vocabulary for pages of features: texts of tokens, and the LM head that a direction pushes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM

from aen_lightning.language_model.cut_model import cut_config, load_config
from aen_lightning.language_model.hook_points import resolve_hook

_RESIDUAL = (
    "hook_embed",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
)


def load_unembedding(
    model_name: str,
    hook_name: str,
    *,
    revision: str | None = None,
    model_from_pretrained_kwargs: dict[str, Any] | None = None,
) -> Tensor | None:
    """The LM head's weight, (vocabulary, d_model), without loading more than one of the model's blocks.

    Returns:
        None if decoder directions at this hook are not directions of the residual stream (``mlp.hook_post``,
        ``attn.hook_z``, a module path), or the LM head is not applied to it (OPT's projected embeddings): no
        output token can be named there.
    """
    kwargs = dict(model_from_pretrained_kwargs or {})
    config = load_config(model_name, revision=revision, model_from_pretrained_kwargs=kwargs)
    hook = resolve_hook(config, hook_name)
    if not hook.hook_name.endswith(_RESIDUAL):
        return None
    small = cut_config(config, 0)
    model = AutoModelForCausalLM.from_pretrained(
        model_name, config=small, revision=revision or "main", **kwargs
    )
    head = model.get_output_embeddings()
    if head is None or head.weight.shape[1] != hook.d_in:
        return None
    return head.weight.detach().float().cpu()


def token_texts(tokenizer: Any) -> Callable[[int], str]:
    """Text of a single token as in a sentence: with its space, and a visible sign for a line break."""
    known: dict[int, str] = {}

    def text_of(token: int) -> str:
        if token not in known:
            piece, text = str(tokenizer.convert_ids_to_tokens(token)), str(tokenizer.decode([token]))
            # SentencePiece tokenizers drop the space of a token that stands alone
            text = f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text
            known[token] = text.replace("\r", "\\r").replace("\n", "↵").replace("\t", "⇥") or piece
        return known[token]

    return text_of
