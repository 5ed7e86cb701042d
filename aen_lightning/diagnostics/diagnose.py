"""Geometry, stability of the code, the coding gap and composition of one dictionary."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from aen_lightning.diagnostics.coding_gap import CodingProblem, coding_gap, coding_problem
from aen_lightning.diagnostics.coherence import coherence
from aen_lightning.diagnostics.composition import composition
from aen_lightning.diagnostics.convexity import coding_convexity
from aen_lightning.diagnostics.gram import active_gram
from aen_lightning.diagnostics.lipschitz import coding_map_lipschitz, encoder_lipschitz
from aen_lightning.evaluate.dictionary import (
    describe_dictionary,
    run_dictionary,
    scaled_space,
    to_scaled_space,
)
from aen_lightning.evaluate.inputs import Inputs
from aen_lightning.evaluate.reconstruction import evaluate_reconstruction
from aen_lightning.evaluate.results import head
from aen_lightning.progress import working

RESULT_FILE = "diagnosis.json"
SECTIONS = ("coherence", "active_gram", "lipschitz", "coding_gap", "composition")
_FLOAT64_LIMIT = 2**25  # elements of a dictionary that is copied to float64: 256 MiB


def diagnose_dictionary(
    sae: SAE[Any],
    inputs: Inputs | None,
    *,
    reference: str | Path = "",
    sections: Collection[str] = SECTIONS,
    n_sample: int = 128,
    n_lipschitz: int = 32,
    l1_coefficient: float | None = None,
    l2_coefficient: float | None = None,
    l1_weights: Tensor | None = None,
    activation_scale: Tensor | None = None,
    n_refine: int = 0,
) -> dict[str, Any]:
    """Everything ``aen diagnose`` reports.

    Args:
        sae: From ``load_dictionary``.
        inputs: Held-out activations; None: only what needs none, the coherence.
        reference: Name of the dictionary, for the result.
        sections: Which of ``SECTIONS``.
        n_sample: Tokens for the Gram spectrum and the coding gap, spread evenly over the inputs.
        n_lipschitz: Of these, tokens for the Lipschitz constants; for each the coding problem is solved again
            and again.
        l1_coefficient: See :func:`aen_lightning.diagnostics.coding_gap.coding_problem`.
        l2_coefficient: See there.
        l1_weights: See there.
        activation_scale: See :func:`aen_lightning.diagnostics.convexity.coding_convexity`.
        n_refine: See :func:`aen_lightning.diagnostics.coding_gap.coding_gap`.

    Returns:
        The JSON, laid out as :mod:`aen_lightning.diagnostics` says.

    Raises:
        ValueError: For an unknown section, a temporal dictionary, or if no feature fires on the inputs.
    """
    if unknown := [s for s in sections if s not in SECTIONS]:
        raise ValueError(f"no section {unknown[0]!r}: choose from {', '.join(SECTIONS)}")
    result = head("diagnose") | {
        "dictionary": describe_dictionary(sae, reference),
        "data": None,
        **dict.fromkeys(SECTIONS),
        "skipped": {},
    }
    convexity = coding_convexity(sae, activation_scale=activation_scale, l1_weights=l1_weights)
    if convexity is not None:
        result["convexity"] = convexity
    if "coherence" in sections:
        with working("coherence of the atoms"):
            result["coherence"] = coherence(sae.W_dec.detach()).summary()
    if inputs is None:
        result["skipped"] = {s: "no inputs were given" for s in sections if s != "coherence"}
        return result
    if set(sections) == {"coherence"}:
        return result
    if sae.cfg.architecture() == "temporal":
        raise ValueError(
            "the codes of a temporal dictionary depend on the tokens before, and what is diagnosed here is "
            "a code of one token: "
            "only coherence can be had (--only coherence)"
        )
    found = evaluate_reconstruction(sae, inputs, n_groups=1)
    result["data"] = inputs.describe() | {"n_tokens": found.n_tokens}
    x = to_scaled_space(sae, _spread(inputs, n_sample, found.n_tokens))
    with scaled_space(sae):
        feature_acts = run_dictionary(sae, x)[0]
        if "active_gram" in sections:
            with working("geometry of the atoms active together"):
                result["active_gram"] = active_gram(sae.W_dec.detach(), feature_acts)
        if "lipschitz" in sections:
            part = slice(0, n_lipschitz)
            with working("changes of the encoder"):
                encoder = encoder_lipschitz(sae, x[part], feature_acts[part])
            result["lipschitz"] = {"n_tokens": len(x[part]), "encoder": encoder}
            result["lipschitz"]["coding_map"] = None
        if {"coding_gap", "lipschitz"} & set(sections):
            try:
                problem = coding_problem(
                    sae, mean_feature_acts=found.density * found.mean_when_active, l1_coefficient=l1_coefficient,
                    l2_coefficient=l2_coefficient, l1_weights=l1_weights,
                )  # fmt: skip
                if (feature_acts < 0).any():
                    raise ValueError("its codes are signed, and the coding problem is for codes that are not")
            except ValueError as err:
                result["skipped"]["coding_gap"] = str(err)
            else:
                _coding(
                    result, sae, x, feature_acts, problem, found.density == 0, sections, n_lipschitz, n_refine
                )
        if "composition" in sections:
            with working("composing features"):
                result["composition"] = composition(sae, found.density, found.mean_when_active)
    return result


def _coding(
    result: dict[str, Any], sae: SAE[Any], x: Tensor, feature_acts: Tensor, problem: CodingProblem, dead: Tensor,
    sections: Collection[str], n_lipschitz: int, n_refine: int,
) -> None:  # fmt: skip
    W_dec, b_dec = sae.W_dec.detach(), sae.b_dec.detach()
    dtype = torch.float64 if W_dec.numel() <= _FLOAT64_LIMIT else torch.float32
    n = len(x) if "coding_gap" in sections else n_lipschitz
    with working("solving for the exact code"):
        section, exact = coding_gap(
            x[:n], feature_acts[:n], W_dec, b_dec, problem, dead=dead, dtype=dtype, n_refine=n_refine
        )
    if "coding_gap" in sections:
        result["coding_gap"] = section
    if "lipschitz" in sections:
        codes = exact.feature_acts[:n_lipschitz]
        with working("changes of the exact code"):
            result["lipschitz"]["coding_map"] = coding_map_lipschitz(
                x[:n_lipschitz], codes, W_dec, b_dec, problem
            )


def _spread(inputs: Inputs, n_sample: int, n_tokens: int) -> Tensor:
    """``n_sample`` of the kept tokens at equal distances, in a random order (seeded), so that any first part
    is spread, too.
    """
    n_sample = min(n_sample, n_tokens)
    wanted = (torch.arange(n_sample, dtype=torch.float64) * n_tokens / n_sample).long()
    found, before = [], 0
    for batch in inputs:
        rows = batch.x[batch.keep]
        mine = wanted[(wanted >= before) & (wanted < before + len(rows))] - before
        found.append(rows[mine.to(rows.device)])
        before += len(rows)
    return torch.cat(found)[torch.randperm(n_sample, generator=torch.Generator().manual_seed(0))]
