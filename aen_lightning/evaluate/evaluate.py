"""Everything that is measured of one dictionary."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from sae_lens import SAE

from aen_lightning.evaluate.absorption import absorption
from aen_lightning.evaluate.dictionary import describe_dictionary, run_dictionary
from aen_lightning.evaluate.downstream import Ablate, evaluate_downstream
from aen_lightning.evaluate.inputs import Inputs, SyntheticInputs, TextInputs
from aen_lightning.evaluate.mdl import description_length
from aen_lightning.evaluate.probing import sparse_probing
from aen_lightning.evaluate.reconstruction import evaluate_reconstruction
from aen_lightning.evaluate.results import head
from aen_lightning.metrics.ground_truth import ground_truth_scores
from aen_lightning.spelling import suggest

RESULT_FILE = "evaluation.json"
SUITES = ("core", "mdl", "probing", "absorption")


def evaluate_dictionary(
    sae: SAE[Any],
    inputs: Inputs,
    *,
    reference: str | Path = "",
    n_downstream_rows: int | None = None,
    downstream_batch_size_prompts: int = 4,
    ablate: Ablate = "all",
    per_feature: bool = False,
    suites: Collection[str] = ("core",),
) -> dict[str, Any]:
    """Everything ``aen evaluate`` reports on one dictionary.

    Args:
        sae: From ``load_dictionary``.
        inputs: Held-out activations; text with its language model gives downstream metrics, synthetic data
            the ground truth.
        reference: Name of the dictionary, for the result.
        n_downstream_rows: Rows of text for the downstream metrics; None: all, 0: no downstream metrics.
        downstream_batch_size_prompts: Rows a call of the whole language model.
        ablate: See :func:`aen_lightning.evaluate.downstream.evaluate_downstream`.
        per_feature: Add density and mean activation of every feature.
        suites: Which of ``SUITES``; ``core`` is all but the others, ``mdl``, ``probing`` and ``absorption``,
            and is always there.

    Returns:
        The JSON, laid out as :mod:`aen_lightning.evaluate` says.

    Raises:
        ValueError: For an unknown suite, or probing or absorption without a language model.
    """
    check_suites(suites)
    for suite in ("probing", "absorption"):
        if suite in suites and not isinstance(inputs, TextInputs):
            raise ValueError(
                f"the suite {suite} reads texts of its own, so it needs a language model: evaluate on text"
            )
    found = evaluate_reconstruction(sae, inputs)
    result = head("evaluate") | {
        "dictionary": describe_dictionary(sae, reference),
        "data": inputs.describe() | {"n_tokens": found.n_tokens},
        "sparsity": found.sparsity,
        "features": found.features(per_feature=per_feature),
        "reconstruction": found.spaces,
        "downstream": None,
        "ground_truth": None,
        "mdl": description_length(sae, inputs) if "mdl" in suites else None,
        "probing": None,
        "absorption": None,
    }
    if "probing" in suites and isinstance(inputs, TextInputs):
        result["probing"] = sparse_probing(sae, inputs)
    if "absorption" in suites and isinstance(inputs, TextInputs):
        result["absorption"] = absorption(sae, inputs)
    if isinstance(inputs, TextInputs) and inputs.lm is not None and n_downstream_rows != 0:
        result["downstream"] = evaluate_downstream(
            sae, inputs, found.mean_activation, n_rows=n_downstream_rows, batch_size_prompts=downstream_batch_size_prompts,
            ablate=ablate,
        )  # fmt: skip
    if isinstance(inputs, SyntheticInputs):
        feature_acts = run_dictionary(sae, inputs.x)[0].cpu()
        result["ground_truth"] = ground_truth_scores(
            sae.W_dec.detach().cpu(), inputs.data.feature_vectors, feature_acts, inputs.true_acts
        )
    return result


def check_suites(suites: Collection[str]) -> Collection[str]:
    """The suites, each of which is one of ``SUITES``.

    Raises:
        ValueError: For another.
    """
    if unknown := [suite for suite in suites if suite not in SUITES]:
        raise ValueError(
            f"no suite {unknown[0]!r}{suggest(unknown[0], SUITES)}: there are {', '.join(SUITES)}"
        )
    return suites
