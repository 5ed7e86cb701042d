"""Pages of features: the texts on which they fire, their neighbours, and the output tokens they push."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens import SAE
from torch import Tensor

from aen_lightning.progress import counted
from aen_lightning.report.activations import Activations

QUANTILES = (0.9, 0.75, 0.5, 0.25)
"""Of a feature's activations where it fires: at these, texts are shown besides those where it is strongest."""
_BINS = 24
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
    n_per_quantile: int = 2,
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
        n_features: How many, without ``feature_ids``; 0: every feature of the dictionary, dead ones too.
        n_contexts: Texts a feature, those where it is strongest; each from another row of tokens, none twice.
        n_per_quantile: Texts where it is as strong as at each of ``QUANTILES`` of its activations.
        window: Tokens before the peak; half as many after it.
        n_neighbours: Features with the nearest decoder directions, and features that fire on the same tokens.
        n_output_tokens: Most promoted and most suppressed output tokens, each.

    Returns:
        ``n_tokens``, ``n_rows``, ``d_sae``, ``n_fired``, and ``features``: dicts of ``id``, ``density``,
        ``mean`` (when active), ``max``, ``neighbours`` ([[id, cosine], ...]), ``together`` ([[id, Jaccard
        index of the tokens on which the two fire], ...]), ``promoted`` and ``suppressed`` ([[text, logit per
        unit], ...], empty without ``unembedding``), ``acts`` and ``logits`` (histograms of its activations
        and of its effect on every output token: ``{"from", "to", "counts"}`` over equal bins, or null), and
        ``contexts``: dicts of ``quantile`` (of its activations at the peak; null for the strongest ones),
        ``peak`` (its place), ``tokens`` (texts) and ``acts`` (numbers; null where a token was left out).

    Raises:
        ValueError: For a feature that does not exist, or if none fired.
    """
    counts = np.diff(activations.feature_acts.indptr)
    ids = _choose(counts, feature_ids, n_features)
    W_dec = sae.W_dec.detach().float().cpu()
    neighbours = _neighbours(W_dec, ids, n_neighbours)
    together = _together(activations, ids, n_neighbours)
    pushed: list[dict[str, Any]] = [{"promoted": [], "suppressed": [], "logits": None}] * len(ids)
    if unembedding is not None:
        pushed = _output_tokens(W_dec[ids], unembedding, n_output_tokens, text_of)
    features = []
    numbered = zip(ids, neighbours, together, pushed, strict=True)
    for feature, near, same, tokens in counted(numbered, "writing pages of features", len(ids), "features"):
        values = activations.of(feature)[1]
        features.append(
            {
                "id": feature,
                "density": float(len(values) / max(1, activations.n_tokens)),
                "mean": float(values.mean()) if len(values) else 0.0,
                "max": float(values.max()) if len(values) else 0.0,
                "neighbours": near,
                "together": same,
                **tokens,
                "acts": _histogram(values, zero=True),
                "contexts": _contexts(activations, feature, text_of, n_contexts, n_per_quantile, window),
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
    if n_features < 0:
        raise ValueError(f"n_features must be at least 1, or 0 for all, got {n_features}")
    order = np.argsort(counts, kind="stable")
    fired = order[counts[order] > 0]
    if not len(fired):
        raise ValueError(
            "no feature fired on these tokens: is it the model and hook the dictionary was trained on?"
        )
    if n_features == 0:
        return [int(i) for i in order]
    at = np.linspace(0, len(fired) - 1, min(n_features, len(fired))).round().astype(int)
    return [int(i) for i in fired[at]]


def _contexts(
    activations: Activations,
    feature: int,
    text_of: Callable[[int], str],
    n_top: int,
    n_per_quantile: int,
    window: int,
) -> list[dict[str, Any]]:
    where, values = activations.of(feature)
    if not len(values):
        return []
    by_value = np.argsort(-values, kind="stable")
    wanted_orders: list[tuple[float | None, NDArray[Any], int]] = [(None, by_value, n_top)]
    for q in QUANTILES:
        nearest = np.argsort(np.abs(values - np.quantile(values, q)), kind="stable")
        wanted_orders.append((q, nearest, n_per_quantile))
    found: list[dict[str, Any]] = []
    rows_shown, shown = set(), set()
    for quantile, order, wanted in wanted_orders:
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
                    "quantile": quantile,
                    "peak": peak - begin,
                    "tokens": [text_of(int(t)) for t in tokens],
                    "acts": [float(f"{a:.4g}") if k else None for a, k in zip(acts, kept, strict=True)],
                }
            )
            taken += 1
    return found


def _histogram(values: NDArray[Any], *, zero: bool = False) -> dict[str, Any] | None:
    """Counts over equal bins from the smallest to the largest value, or from 0 if none lies below it."""
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    low = min(low, 0.0) if zero else low
    counts, _ = np.histogram(values, bins=_BINS, range=(low, high))
    return {"from": float(f"{low:.4g}"), "to": float(f"{high:.4g}"), "counts": counts.tolist()}


def _together(activations: Activations, ids: Sequence[int], n: int) -> list[list[list[Any]]]:
    """The features that fire on the same tokens, [[id, Jaccard index], ...] for each of ``ids``."""
    fires = activations.feature_acts.astype(bool).astype(np.float32)
    by_token, n_fires = fires.tocsr(), np.diff(fires.indptr).astype(np.float64)
    found = []
    for start in range(0, len(ids), _CHUNK):
        chunk = np.asarray(ids[start : start + _CHUNK])
        both = (fires[:, chunk].T @ by_token).tocsr()
        for row, feature in enumerate(chunk):
            part = slice(both.indptr[row], both.indptr[row + 1])
            other, n_both = both.indices[part], both.data[part].astype(np.float64)
            jaccard = n_both / (n_fires[feature] + n_fires[other] - n_both)
            jaccard[other == feature] = 0
            best = np.argsort(-jaccard, kind="stable")[:n]
            found.append([[int(other[i]), round(float(jaccard[i]), 4)] for i in best if jaccard[i] > 0])
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
) -> list[dict[str, Any]]:
    """Per feature ``promoted`` and ``suppressed``, [[text, logit], ...] each, and ``logits`` of all tokens."""
    n, found = min(n, len(unembedding)), []
    for chunk in W.split(_CHUNK):
        logits = chunk @ unembedding.float().T
        sides = []
        for largest in (True, False):
            top = logits.topk(n, dim=-1, largest=largest)
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            sides.append([[[text_of(i), round(v, 4)] for i, v in zip(*pair, strict=True)] for pair in pairs])
        for promoted, suppressed, row in zip(*sides, logits.numpy(), strict=True):
            found.append({"promoted": promoted, "suppressed": suppressed, "logits": _histogram(row)})
    return found
