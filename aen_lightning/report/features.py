"""Pages of features: the texts on which they fire, their neighbours, and the output tokens they push."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens import SAE
from torch import Tensor

from aen_lightning.report.activations import Activations

_CHUNK = 256  # features whose products with the dictionary or the vocabulary are held at once


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
        feature_ids: Which features; None takes ``n_features`` of those that fired, at equal distances from
            the rarest to the most frequent.
        n_features: How many, without ``feature_ids``.
        n_contexts: Texts a feature, those where it is strongest; each from another row of tokens, none twice.
        n_ordinary: Texts where it is as strong as its median.
        window: Tokens before the peak; half as many after it.
        n_neighbours: Features with the nearest decoder directions.
        n_output_tokens: Most promoted and most suppressed output tokens, each.

    Returns:
        ``n_tokens``, ``n_rows``, ``d_sae``, ``n_fired``, and ``features``: dicts of ``id``, ``density``,
        ``mean`` (when active), ``max``, ``neighbours`` ([[id, cosine], ...]), ``promoted`` and ``suppressed``
        ([[text, logit per unit], ...], empty without ``unembedding``), and ``contexts``: dicts of ``kind``
        (``top`` or ``ordinary``), ``peak`` (its place), ``tokens`` (texts) and ``acts`` (numbers; null where
        a token was left out).

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
        values = activations.of(feature)[1]
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
            raise ValueError(
                f"there is no feature {wrong[0]}: the dictionary has features 0 to {len(counts) - 1}"
            )
        return list(dict.fromkeys(feature_ids))
    if n_features < 1:
        raise ValueError(f"n_features must be at least 1, got {n_features}")
    order = np.argsort(counts, kind="stable")
    fired = order[counts[order] > 0]
    if not len(fired):
        raise ValueError(
            "no feature fired on these tokens: is it the model and hook the dictionary was trained on?"
        )
    at = np.linspace(0, len(fired) - 1, min(n_features, len(fired))).round().astype(int)
    return [int(i) for i in fired[at]]


def _contexts(
    activations: Activations,
    feature: int,
    text_of: Callable[[int], str],
    n_top: int,
    n_ordinary: int,
    window: int,
) -> list[dict[str, Any]]:
    where, values = activations.of(feature)
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


def _normalized(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def _neighbours(W_dec: Tensor, ids: Sequence[int], n: int) -> list[list[list[Any]]]:
    """The features with the largest cosines, [[id, cosine], ...] for each of ``ids``."""
    directions, found = _normalized(W_dec), []
    for chunk in torch.tensor(ids).split(_CHUNK):
        cosines = directions[chunk] @ directions.T
        cosines[torch.arange(len(chunk)), chunk] = -2.0
        top = cosines.topk(min(n, len(W_dec) - 1), dim=-1)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        found += [[[i, round(c, 4)] for i, c in zip(*pair, strict=True)] for pair in pairs]
    return found


def _output_tokens(
    W: Tensor, unembedding: Tensor, n: int, text_of: Callable[[int], str]
) -> list[tuple[list[list[Any]], list[list[Any]]]]:
    """Per feature the most promoted and most suppressed tokens, [[text, logit], ...] each."""
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
