"""How many bits it takes to send a dictionary's codes: minimum description length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from aen_lightning.evaluate.dictionary import run_dictionary, scaled_space, to_scaled_space, tokens_per_chunk
from aen_lightning.evaluate.inputs import Inputs
from aen_lightning.progress import counted


@torch.no_grad()
def description_length(
    sae: SAE[Any],
    inputs: Inputs,
    *,
    n_tokens: int = 4096,
    levels: Sequence[int] = (2, 4, 8, 16, 32, 64, 128, 256),
    tolerance: float = 0.01,
) -> dict[str, Any]:
    """Round every feature's activations to a few levels, and count the bits that naming the levels takes.

    A feature's activations are rounded to ``levels`` equal steps up to its largest, zero stays zero, and each
    feature is coded by itself at its entropy over the tokens: dense codes and many levels cost much. The
    fewest levels count whose squared error is at most ``tolerance`` above that of the codes as they are.

    Args:
        sae: From ``load_dictionary``.
        inputs: Raw activations.
        n_tokens: Tokens to take, from the first.
        levels: Numbers of levels to try, ascending.
        tolerance: Share by which the squared error may rise.

    Returns:
        The section ``mdl``: ``n_tokens``, ``tolerance``, ``levels``, and lists as long: ``bits_per_token``,
        ``mse`` (mean over d_in, in the space the dictionary was trained in); ``mse_unrounded``; and ``chosen``:
        ``{"levels", "bits_per_token"}``, null if no number of levels is enough.

    Raises:
        ValueError: For a temporal dictionary, or one whose codes are signed.

    Source: Ayonrinde et al., arXiv:2410.11179. The entropy is that of the tokens seen, which is too low where
        they are few.
    """
    if sae.cfg.architecture() == "temporal":
        raise ValueError("the codes of a temporal dictionary depend on the tokens before")
    x = to_scaled_space(sae, inputs.tokens(n_tokens))
    chunks, d_sae = x.split(tokens_per_chunk(sae)), sae.cfg.d_sae
    highest = torch.zeros(d_sae, device=sae.device)
    counts = [torch.zeros(d_sae * n, dtype=torch.int64, device=sae.device) for n in levels]
    errors = torch.zeros(len(levels) + 1, dtype=torch.float64)
    with scaled_space(sae):
        for chunk in counted(chunks, "finding the largest activations", len(chunks)):
            feature_acts = run_dictionary(sae, chunk)[0]
            if (feature_acts < 0).any():
                raise ValueError("its codes are signed, and levels are counted for codes that are not")
            highest = torch.maximum(highest, feature_acts.amax(dim=0))
        for chunk in counted(chunks, "rounding codes", len(chunks)):
            feature_acts, x_hat = run_dictionary(sae, chunk)
            errors[-1] += _squared_error(chunk, x_hat)
            token, feature = feature_acts.nonzero(as_tuple=True)
            share = feature_acts[token, feature] / highest[feature]
            for i, n in enumerate(levels):
                level = (share * n).ceil().long().clamp(1, n)
                counts[i] += torch.bincount(feature * n + level - 1, minlength=d_sae * n)
                rounded = torch.zeros_like(feature_acts)
                rounded[token, feature] = (level - 0.5) / n * highest[feature]
                errors[i] += _squared_error(chunk, sae.decode(rounded.to(sae.dtype)))
    bits = [_entropy(c.view(d_sae, n), len(x)) for c, n in zip(counts, levels, strict=True)]
    mse = (errors / x.numel()).tolist()
    enough = [i for i in range(len(levels)) if mse[i] <= (1 + tolerance) * mse[-1]]
    chosen = {"levels": levels[enough[0]], "bits_per_token": bits[enough[0]]} if enough else None
    return {
        "n_tokens": len(x),
        "tolerance": tolerance,
        "levels": list(levels),
        "bits_per_token": bits,
        "mse": mse[:-1],
        "mse_unrounded": mse[-1],
        "chosen": chosen,
    }


def _squared_error(x: Tensor, x_hat: Tensor) -> float:
    return float((x - x_hat.to(x.dtype)).square().sum(dtype=torch.float64))


def _entropy(counts: Tensor, n_tokens: int) -> float:
    """Bits a token: the sum over features of the entropy of (zero, level 1, ...); counts (d_sae, levels)."""
    silent = n_tokens - counts.sum(dim=1, keepdim=True)
    share = torch.cat([silent, counts], dim=1).double() / n_tokens
    return float(-(share * share.clamp_min(1e-300).log2()).sum())
