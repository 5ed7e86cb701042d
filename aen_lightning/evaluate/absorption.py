"""Whether features leave out cases that another feature has taken over: feature absorption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor

from aen_lightning.evaluate.dictionary import run_dictionary, scaled_space, to_scaled_space, tokens_per_chunk
from aen_lightning.evaluate.first_letters import Word, first_letter_words, read_words
from aen_lightning.evaluate.inputs import TextInputs
from aen_lightning.evaluate.probing import fit_logistic
from aen_lightning.metrics import ACTIVE_THRESHOLD
from aen_lightning.progress import counted

TEST_EVERY = 5
"""Of a letter's words, ordered as in the vocabulary, every fifth is a test."""
MAX_MAIN_FEATURES = 10
MIN_F1_GAIN = 0.03
"""A further feature is one of those that stand for a letter if a probe gains so much F1 by it."""
MIN_COSINE = 0.025
MIN_FRACTION_COSINE = 0.1
"""Of a feature's direction with the probe's, to have absorbed a word alone, and with others."""
MIN_SHARE = 0.4
"""Of the probe's projection that must come from the features that absorbed the word."""
MAX_ABSORBING_FEATURES = 3


def absorption(sae: SAE[Any], inputs: TextInputs) -> dict[str, Any]:
    """Feature absorption on first letters: ``first_letter_absorption`` of words of the model's vocabulary.

    Args:
        sae: From ``load_dictionary``.
        inputs: Gives the language model, the tokenizer and the hook; its own rows are not read.

    Raises:
        ValueError: For a temporal dictionary, or a vocabulary without words of two letters of the alphabet.
    """
    words = first_letter_words(inputs.data.source.tokenizer())
    return first_letter_absorption(sae, read_words(inputs, words), words)


@torch.no_grad()
def first_letter_absorption(sae: SAE[Any], x: Tensor, words: Sequence[Word]) -> dict[str, Any]:
    """How often a word's first letter is in its activation, and yet no feature that stands for it fires.

    1. A logistic regression for each letter, against all others, finds the letter's direction p in the
       activations of four fifths of the words (the others are tests).
    2. The letter's *main features* are those whose activations differ most between its words and the
       others, in standard deviations: one, and a further one as long as F1 of a logistic regression on them
       rises by more than 0.03.
    3. A test word on which the probes' largest logit is that of its letter is *fully absorbed* if no main
       feature fires, and the feature that contributes most to ``x @ p`` points along p (cosine >= 0.025)
       and contributes at least 0.4 of it. The contribution of feature j is ``feature_acts_j W_dec_j @ p``.
    4. The *fraction* absorbed is the share in what main features and the three others that contribute most
       (cosine >= 0.1) contribute together; 0 where those three contribute less than 0.4 of ``x @ p``.

    Args:
        sae: From ``load_dictionary``.
        x: Raw activations of the words, (n, d_in).
        words: As many words.

    Returns:
        The section ``absorption``: ``n_words``, ``n_test``; ``letters``: by letter ``n_train``, ``n_test``,
        ``n_right`` (test words that the probe knows), ``main_features``, ``f1`` (of the probe on them, on
        test words), ``silent`` (share of the n_right on which no main feature fires), ``full``,
        ``fraction``, and ``absorbing_features`` ([[feature, words], ...], most words first);
        ``accuracy_of_activations`` (of the letters' probes, on test words), and the means over letters of
        ``f1``, ``silent``, ``full`` and ``fraction`` (null where no test word was right).

    Raises:
        ValueError: For a temporal dictionary.

    Source: Chanin et al., arXiv:2409.14507, with the projections that SAEBench, arXiv:2503.09532, puts in
        the place of ablations; its words and probes are others: numbers are not to be compared with its.
    """
    if sae.cfg.architecture() == "temporal":
        raise ValueError("the codes of a temporal dictionary depend on the tokens before")
    x = to_scaled_space(sae, x)
    letters = sorted({word.letter for word in words})
    letter_of = torch.tensor([letters.index(word.letter) for word in words])
    is_test = _every_fifth(letter_of)
    train, test = (~is_test).nonzero().squeeze(-1), is_test.nonzero().squeeze(-1)
    with scaled_space(sae):
        ranked = _ranked_features(sae, x[train], letter_of[train], len(letters))
        probes = torch.stack(
            [
                fit_logistic(x[train].cpu(), letter_of[train] == i, balanced=True)
                for i in counted(range(len(letters)), "probing first letters", len(letters), "letters")
            ]
        )
        logits = x[test].double().cpu() @ probes[:, :-1].T + probes[:, -1]
        right = logits.argmax(dim=1) == letter_of[test]
        of_ranked = torch.cat([h[:, ranked.flatten().to(h.device)].cpu() for _, h in _codes(sae, x)])
        of_ranked = of_ranked.double().unflatten(1, ranked.shape)
        found: dict[str, dict[str, Any]] = {}
        for i in counted(range(len(letters)), "looking for absorbed letters", len(letters), "letters"):
            y = (letter_of == i).double()
            n_main, f1 = _n_main_features(of_ranked[train, i], y[train], of_ranked[test, i], y[test])
            main = ranked[i, :n_main].tolist()
            mine = test[right & (letter_of[test] == i)]
            absorbed = absorbed_words(sae, x[mine], probes[i, :-1], main)
            found[letters[i]] = {
                "n_train": int((letter_of[train] == i).sum()),
                "n_test": int((letter_of[test] == i).sum()),
                "n_right": len(mine),
                "main_features": main,
                "f1": f1,
                "silent": _mean(absorbed.silent),
                "full": _mean(absorbed.by >= 0),
                "fraction": _mean(absorbed.fraction),
                "absorbing_features": _by_frequency(absorbed.by[absorbed.by >= 0]),
            }
    measured = [v for v in found.values() if v["n_right"]]
    return {
        "n_words": len(words),
        "n_test": len(test),
        "letters": found,
        "accuracy_of_activations": float(right.double().mean()),
        **{
            key: sum(v[key] for v in measured) / len(measured) if measured else None
            for key in ("f1", "silent", "full", "fraction")
        },
    }


class Absorbed(NamedTuple):
    """Of each of n words: whether the main features are silent, who absorbed it alone (-1: none), and the
    fraction absorbed.
    """

    silent: Tensor
    by: Tensor
    fraction: Tensor


def absorbed_words(sae: SAE[Any], x: Tensor, direction: Tensor, main: Sequence[int]) -> Absorbed:
    """Steps 3 and 4 of ``first_letter_absorption``.

    Args:
        sae: The dictionary, in the space of ``x``.
        x: Activations of the words, (n, d_in).
        direction: Of the probe, (d_in,); its length plays no part.
        main: The main features.
    """
    W_dec = sae.W_dec.detach().double()
    p = direction.double().to(W_dec.device)
    p = p / p.norm().clamp_min(torch.finfo(p.dtype).tiny)
    along = W_dec @ p
    cosine = along / W_dec.norm(dim=1).clamp_min(torch.finfo(p.dtype).tiny)
    is_main = torch.zeros(len(W_dec), dtype=torch.bool, device=W_dec.device)
    is_main[list(main)] = True
    parts = [Absorbed(*(torch.zeros(0, dtype=dtype) for dtype in (torch.bool, torch.int64, torch.float64)))]
    for chunk, feature_acts in _codes(sae, x):
        given, contributions = chunk.double() @ p, feature_acts.double() * along
        silent = (feature_acts[:, is_main].abs() <= ACTIVE_THRESHOLD).all(dim=1)
        most, by = contributions.max(dim=1)
        full = silent & (given > 0) & (cosine[by] >= MIN_COSINE) & (most >= MIN_SHARE * given)
        by_main = contributions[:, is_main].sum(dim=1)
        others = contributions.masked_fill(is_main | (cosine < MIN_FRACTION_COSINE), 0.0).clamp_min(0.0)
        by_others = others.topk(min(MAX_ABSORBING_FEATURES, len(W_dec)), dim=1).values.sum(dim=1)
        some = (given > 0) & (by_main < given) & (by_others >= MIN_SHARE * given)
        missing = torch.minimum(by_others, given - by_main.clamp_min(0.0))  # no more than main leaves over
        fraction = missing / (missing + by_main.clamp_min(0.0))
        parts.append(
            Absorbed(
                silent.cpu(), by.where(full, -1).cpu(), fraction.where(some, torch.zeros_like(fraction)).cpu()
            )
        )
    return Absorbed(*map(torch.cat, zip(*parts, strict=True)))


def _every_fifth(letter_of: Tensor) -> Tensor:
    is_test = torch.zeros(len(letter_of), dtype=torch.bool)
    for letter in letter_of.unique():
        is_test[(letter_of == letter).nonzero().squeeze(-1)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return is_test


def _codes(sae: SAE[Any], x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of x, and their codes: never the codes of all words at once."""
    for chunk in x.split(tokens_per_chunk(sae)):
        yield chunk, run_dictionary(sae, chunk)[0]


def _ranked_features(sae: SAE[Any], x: Tensor, letter_of: Tensor, n_letters: int) -> Tensor:
    """For each letter the features that fire more on its words, by standard deviations; (n_letters, k)."""
    sums = torch.zeros(n_letters, sae.cfg.d_sae, dtype=torch.float64, device=sae.device)
    squares = torch.zeros(sae.cfg.d_sae, dtype=torch.float64, device=sae.device)
    first = 0
    for chunk, feature_acts in _codes(sae, x):
        feature_acts = feature_acts.double()
        sums.index_add_(0, letter_of[first : first + len(chunk)].to(sae.device), feature_acts)
        squares += feature_acts.square().sum(dim=0)
        first += len(chunk)
    n = torch.bincount(letter_of, minlength=n_letters).double().to(sae.device).unsqueeze(1)
    total = sums.sum(dim=0)
    variance = squares / len(x) - (total / len(x)).square()
    difference = sums / n - (total - sums) / (len(x) - n)
    in_deviations = torch.where(variance > 0, difference / variance.clamp_min(1e-30).sqrt(), -torch.inf)
    return in_deviations.topk(min(MAX_MAIN_FEATURES, sae.cfg.d_sae), dim=1).indices.cpu()


def _n_main_features(h: Tensor, y: Tensor, h_test: Tensor, y_test: Tensor) -> tuple[int, float]:
    """How many of the ranked features stand for a letter, and F1 of a probe on them, on test words.

    How many is seen on the words that the probe is trained on.
    """
    n_main, best, weights = 0, -torch.inf, torch.zeros(0)
    for k in range(1, h.shape[1] + 1):
        fitted = fit_logistic(h[:, :k], y, balanced=True)
        f1 = _f1(h[:, :k], y, fitted)
        if f1 - best <= MIN_F1_GAIN:
            break
        n_main, best, weights = k, f1, fitted
    return n_main, _f1(h_test[:, :n_main], y_test, weights)


def _f1(h: Tensor, y: Tensor, weights: Tensor) -> float:
    """Of a probe's answers: the harmonic mean of precision and recall."""
    said, true = h @ weights[:-1] + weights[-1] > 0, y > 0.5
    both = (said & true).sum()
    return float(2 * both / (said.sum() + true.sum()).clamp_min(1))


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None


def _by_frequency(features: Tensor) -> list[list[int]]:
    ids, counts = features.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return [[int(ids[i]), int(counts[i])] for i in order]
