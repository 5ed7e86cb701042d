"""Pages of features: the texts on which they fire, their neighbours, and the output tokens they push."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens import SAE
from scipy.sparse import csc_array
from torch import Tensor
from transformers import AutoModelForCausalLM

from aen_lightning.evaluate.dictionary import scaled_space, to_scaled_space, tokens_per_chunk
from aen_lightning.evaluate.inputs import Inputs, ShardInputs, TextInputs
from aen_lightning.language_model.cut_model import cut_config, load_config
from aen_lightning.language_model.hook_points import resolve_hook
from aen_lightning.metrics import ACTIVE_THRESHOLD

MAX_ACTIVATIONS = 2**27
"""Most non-zero activations held at once: 8 bytes each, 1 GiB, and as much again while they are sorted."""
_CHUNK = 256  # features whose products with the dictionary or the vocabulary are held at once
_RESIDUAL = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


@dataclass
class Activations:
    """The code of a dictionary on rows of tokens.

    Args:
        tokens: Token ids, (n_rows, context); -1 where a row is filled up.
        keep: Whether a token counts, (n_rows, context), bool; special tokens and outliers do not.
        feature_acts: Non-zero activations, (n_rows * context, d_sae), sparse by column.
    """

    tokens: NDArray[np.int64]
    keep: NDArray[np.bool_]
    feature_acts: csc_array[Any]

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return int(self.keep.sum())


@torch.no_grad()
def collect_activations(sae: SAE[Any], inputs: Inputs) -> Activations:
    """Encode held-out tokens, in one pass, and keep what fires.

    Args:
        sae: From ``load_dictionary``.
        inputs: Text, or shards with token ids.

    Raises:
        ValueError: If the inputs have no tokens, or more fires than memory is meant for.
    """
    tokens = _tokens(inputs)
    keep, rows, columns, values, n_active = np.zeros(tokens.shape, dtype=bool), [], [], [], 0
    for batch in inputs:
        flat, kept = batch.x.flatten(0, 1), batch.keep.flatten().cpu()
        keep[batch.first_unit : batch.first_unit + len(batch.keep)] = batch.keep.cpu().numpy()
        for index in kept.nonzero().squeeze(-1).split(tokens_per_chunk(sae)):
            x = to_scaled_space(sae, flat[index.to(flat.device)])
            with scaled_space(sae):
                h = sae.encode(x.to(sae.dtype))
            h = h.to_dense() if h.is_sparse else h
            token, feature = (h.abs() > ACTIVE_THRESHOLD).nonzero(as_tuple=True)
            values.append(h[token, feature].float().cpu().numpy())
            rows.append((index[token.cpu()] + batch.first_unit * tokens.shape[1]).numpy().astype(np.int32))
            columns.append(feature.cpu().numpy().astype(np.int32))
            n_active += len(token)
            if n_active > MAX_ACTIVATIONS:
                raise ValueError(
                    f"more than {MAX_ACTIVATIONS:,} activations (L0 is about {n_active / max(1, keep.sum()):,.0f}): take fewer tokens, "
                    "with --n-rows for text or --n-tokens for shards"
                )
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return Activations(tokens, keep, csc_array(entries, shape=(tokens.size, sae.cfg.d_sae)))


def _tokens(inputs: Inputs) -> NDArray[np.int64]:
    if isinstance(inputs, TextInputs):
        return inputs.rows.numpy().astype(np.int64)
    if isinstance(inputs, ShardInputs):
        ids = inputs.source.token_ids()
        if ids is None:
            raise ValueError(f"{inputs.source.path} has no token ids, so there are no texts to show")
        mine = ids[inputs.start : inputs.start + inputs.n_rows].numpy().astype(np.int64)
        filled = np.pad(mine, (0, inputs.n_units * inputs.unit - len(mine)), constant_values=-1)
        return filled.reshape(inputs.n_units, inputs.unit)
    raise ValueError(
        "pages of features need text, or shards with token ids; a dictionary of synthetic data has neither"
    )


def feature_pages(
    sae: SAE[Any],
    activations: Activations,
    text_of: Callable[[int], str],
    *,
    unembedding: Tensor | None = None,
    feature_ids: Sequence[int] | None = None,
    n_features: int = 200,
    n_contexts: int = 8,
    n_ordinary: int = 2,
    window: int = 16,
    n_neighbours: int = 5,
    n_output_tokens: int = 8,
) -> dict[str, Any]:
    """What the page of features shows, as JSON.

    Args:
        sae: The dictionary.
        activations: Its code on text.
        text_of: Text of a token id.
        unembedding: LM head, (vocabulary, d_in), if the dictionary lives in the residual stream.
        feature_ids: Which features; None takes ``n_features`` of those that fired, at equal distances from the rarest to the
            most frequent.
        n_features: How many, without ``feature_ids``.
        n_contexts: Texts a feature, those where it is strongest; each from another row of tokens, none twice.
        n_ordinary: Texts where it is as strong as its median.
        window: Tokens before the peak; half as many after it.
        n_neighbours: Features with the nearest decoder directions.
        n_output_tokens: Most promoted and most suppressed output tokens, each.

    Returns:
        ``n_tokens``, ``n_rows``, ``d_sae``, ``n_fired``, and ``features``: dicts of ``id``, ``density``, ``mean`` (when active),
        ``max``, ``neighbours`` ([[id, cosine], ...]), ``promoted`` and ``suppressed`` ([[text, logit per unit], ...], empty without
        ``unembedding``), and ``contexts``: dicts of ``kind`` (``top`` or ``ordinary``), ``peak`` (its place), ``tokens`` (texts) and
        ``acts`` (numbers; null where a token was left out).

    Raises:
        ValueError: For a feature that does not exist, or if none fired.
    """
    counts = np.diff(activations.feature_acts.indptr)
    ids = _choose(counts, feature_ids, n_features)
    W_dec = sae.W_dec.detach().float().cpu()
    neighbours = _neighbours(W_dec, ids, n_neighbours)
    pushed: list[tuple[list[list[Any]], list[list[Any]]]] = [([], [])] * len(ids)
    if unembedding is not None:
        pushed = _output_tokens(W_dec[ids], unembedding, n_output_tokens, text_of)
    features = []
    for feature, near, (promoted, suppressed) in zip(ids, neighbours, pushed, strict=True):
        values = _column(activations, feature)[1]
        features.append(
            {
                "id": feature,
                "density": float(len(values) / max(1, activations.n_tokens)),
                "mean": float(values.mean()) if len(values) else 0.0,
                "max": float(values.max()) if len(values) else 0.0,
                "neighbours": near,
                "promoted": promoted,
                "suppressed": suppressed,
                "contexts": _contexts(activations, feature, text_of, n_contexts, n_ordinary, window),
            }
        )
    return {
        "n_tokens": activations.n_tokens,
        "n_rows": len(activations.tokens),
        "d_sae": len(counts),
        "n_fired": int((counts > 0).sum()),
        "features": features,
    }


def _choose(counts: NDArray[Any], feature_ids: Sequence[int] | None, n_features: int) -> list[int]:
    if feature_ids is not None:
        if wrong := [i for i in feature_ids if not 0 <= i < len(counts)]:
            raise ValueError(f"there is no feature {wrong[0]}: the dictionary has features 0 to {len(counts) - 1}")
        return list(dict.fromkeys(feature_ids))
    if n_features < 1:
        raise ValueError(f"n_features must be at least 1, got {n_features}")
    order = np.argsort(counts, kind="stable")
    fired = order[counts[order] > 0]
    if not len(fired):
        raise ValueError("no feature fired on these tokens: is it the model and hook the dictionary was trained on?")
    at = np.linspace(0, len(fired) - 1, min(n_features, len(fired))).round().astype(int)
    return [int(i) for i in fired[at]]


def _column(activations: Activations, feature: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Where a feature fires (numbers of tokens, ascending), and how strongly."""
    matrix = activations.feature_acts
    part = slice(matrix.indptr[feature], matrix.indptr[feature + 1])
    return matrix.indices[part], matrix.data[part]


def _contexts(
    activations: Activations, feature: int, text_of: Callable[[int], str], n_top: int, n_ordinary: int, window: int
) -> list[dict[str, Any]]:
    where, values = _column(activations, feature)
    if not len(values):
        return []
    by_value = np.argsort(-values, kind="stable")
    middle = np.argsort(np.abs(values - np.median(values)), kind="stable")
    found: list[dict[str, Any]] = []
    rows_shown, shown = set(), set()
    for kind, order, wanted in (("top", by_value, n_top), ("ordinary", middle, n_ordinary)):
        taken = 0
        for at in order:
            if taken == wanted:
                break
            row, peak = divmod(int(where[at]), activations.tokens.shape[1])
            begin, end = max(0, peak - window), peak + 1 + window // 2
            tokens = activations.tokens[row, begin:end]
            tokens = tokens[tokens >= 0]
            # corpora repeat boilerplate: the same text again teaches nothing
            if row in rows_shown or (key := tokens.tobytes()) in shown:
                continue
            rows_shown.add(row)
            shown.add(key)
            first = row * activations.tokens.shape[1] + begin
            inside = (where >= first) & (where < first + len(tokens))
            acts = np.zeros(len(tokens))
            acts[where[inside] - first] = values[inside]
            kept = activations.keep[row, begin : begin + len(tokens)]
            found.append(
                {
                    "kind": kind,
                    "peak": peak - begin,
                    "tokens": [text_of(int(t)) for t in tokens],
                    "acts": [float(f"{a:.4g}") if k else None for a, k in zip(acts, kept, strict=True)],
                }
            )
            taken += 1
    return found


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def _neighbours(W_dec: Tensor, ids: Sequence[int], n: int) -> list[list[list[Any]]]:
    """The features with the largest cosines, [[id, cosine], ...] for each of ``ids``."""
    unit, found = _unit(W_dec), []
    for chunk in torch.tensor(ids).split(_CHUNK):
        cosines = unit[chunk] @ unit.T
        cosines[torch.arange(len(chunk)), chunk] = -2.0
        top = cosines.topk(min(n, len(W_dec) - 1), dim=-1)
        found += [[[i, round(c, 4)] for i, c in zip(*pair, strict=True)] for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)]  # fmt: skip
    return found


def _output_tokens(
    W: Tensor, unembedding: Tensor, n: int, text_of: Callable[[int], str]
) -> list[tuple[list[list[Any]], list[list[Any]]]]:
    """Per feature the most promoted and most suppressed tokens with their logits, [[text, logit], ...] each."""
    n, found = min(n, len(unembedding)), []
    for chunk in W.split(_CHUNK):
        logits = chunk @ unembedding.float().T
        sides = []
        for largest in (True, False):
            top = logits.topk(n, dim=-1, largest=largest)
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            sides.append([[[text_of(i), round(v, 4)] for i, v in zip(*pair, strict=True)] for pair in pairs])
        found += list(zip(*sides, strict=True))
    return found


def load_unembedding(
    model_name: str,
    hook_name: str,
    *,
    revision: str | None = None,
    model_from_pretrained_kwargs: dict[str, Any] | None = None,
) -> Tensor | None:
    """The LM head's weight, (vocabulary, d_model), without loading more than one of the model's blocks.

    Returns:
        None if decoder directions at this hook are not directions of the residual stream (``mlp.hook_post``, ``attn.hook_z``, a module
        path), or the LM head is not applied to it (OPT's projected embeddings): no output token can be named there.
    """
    kwargs = dict(model_from_pretrained_kwargs or {})
    config = load_config(model_name, revision=revision, model_from_pretrained_kwargs=kwargs)
    hook = resolve_hook(config, hook_name)
    if not hook.hook_name.endswith(_RESIDUAL):
        return None
    small = cut_config(config, 0)
    model = AutoModelForCausalLM.from_pretrained(model_name, config=small, revision=revision or "main", **kwargs)
    head = model.get_output_embeddings()
    if head is None or head.weight.shape[1] != hook.d_in:
        return None
    return head.weight.detach().float().cpu()


def token_texts(tokenizer: Any) -> Callable[[int], str]:
    """Text of a single token as it stands in a sentence: with its space, and a visible sign for a line break."""
    known: dict[int, str] = {}

    def text_of(token: int) -> str:
        if token not in known:
            piece, text = str(tokenizer.convert_ids_to_tokens(token)), str(tokenizer.decode([token]))
            # SentencePiece tokenizers drop the space of a token that stands alone
            text = f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text
            known[token] = text.replace("\r", "\\r").replace("\n", "↵").replace("\t", "⇥") or piece
        return known[token]

    return text_of
