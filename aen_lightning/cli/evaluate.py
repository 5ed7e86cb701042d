"""``aen evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from aen_lightning.cli.inputs import EvaluationInputs


def evaluate(
    dictionary: list[str],
    *,
    out: str | None = None,
    suite: str = "core",
    downstream: bool = True,
    n_downstream_rows: int = 64,
    downstream_batch_size_prompts: int = 4,
    ablate: Literal["all", "counted"] = "all",
    per_feature: bool = False,
    inputs: EvaluationInputs = EvaluationInputs(),  # noqa: B008  # frozen
) -> None:
    """How good dictionaries are on held-out data.

    Sparsity, reconstruction, dead features, how evenly features are used, and what splicing the dictionary in
    costs the language model. Writes evaluation.json into each dictionary's folder.

    Args:
        dictionary: Folder with cfg.json, or RELEASE:ID as for SAE.from_pretrained.
        out: File for the result, of one dictionary only. null: evaluation.json in its folder.
        suite: What to measure, with commas between: core; mdl (bits that the codes take); probing (whether few
            features tell kinds of text apart, on short texts that come with the package); absorption (how
            often a word's first letter is left out by the features that stand for it).
        downstream: CE and KL of the language model. Without them it is cut after the hook, which is quicker.
        n_downstream_rows: Rows for CE and KL, which take four passes of the whole model each; 0: as many as
            for the rest.
        downstream_batch_size_prompts: Rows a call of the whole model.
        ablate: Ablations replace every position, as in SAELens (all), or those that the dictionary replaces
            (counted).
        per_feature: Add every feature's density to the result.
        inputs: What to evaluate on.
    """
    from aen_lightning.cli.opening import InputOpener, device_of
    from aen_lightning.cli.output import answer, remark
    from aen_lightning.evaluate.dictionary import load_dictionary
    from aen_lightning.evaluate.evaluate import RESULT_FILE, check_suites, evaluate_dictionary
    from aen_lightning.evaluate.results import result_path, short_names, write_result

    if out is not None and len(dictionary) > 1:
        raise ValueError(
            "--out takes one dictionary; several are written to evaluation.json in their own folders"
        )
    suites = check_suites([word.strip() for word in suite.split(",")])
    opener = InputOpener(inputs, whole_lm=downstream)
    results = []
    for reference in dictionary:
        sae = load_dictionary(reference, device=device_of(inputs), dtype=inputs.dtype)
        result = evaluate_dictionary(
            sae,
            opener.open(sae),
            reference=reference,
            n_downstream_rows=n_downstream_rows or None,
            downstream_batch_size_prompts=downstream_batch_size_prompts,
            ablate=ablate,
            per_feature=per_feature,
            suites=suites,
        )
        results.append(result)
        # one by one, so that an error in the next takes nothing away
        if (path := result_path(reference, out, RESULT_FILE)) is not None:
            write_result(result, path)
            remark(f"wrote {path}")
    answer({"results": results}, lambda: evaluation_table(results, short_names(dictionary)))


_SCREEN = (
    ("L0", ("sparsity", "l0")),
    ("dead features %", ("features", "dead_pct")),
    ("Gini of firing rates", ("features", "gini")),
    ("mass of top 1 %", ("features", "top_1pct_mass")),
    ("mass of top 10 %", ("features", "top_10pct_mass")),
    ("entropy / log d_sae", ("features", "normalized_entropy")),
    ("reconstruction, scaled to equal norms", ()),
    ("explained variance", ("reconstruction", "scaled", "explained_variance")),
    ("mean squared error", ("reconstruction", "scaled", "mse")),
    ("shrinkage |x_hat|/|x|", ("reconstruction", "scaled", "shrinkage_ratio")),
    ("reconstruction, raw activations", ()),
    ("explained variance", ("reconstruction", "raw", "explained_variance")),
    ("R2 (SAELens)", ("reconstruction", "raw", "r2")),
    ("cosine", ("reconstruction", "raw", "cosine")),
    ("mean squared error", ("reconstruction", "raw", "mse")),
    ("language model with the reconstruction spliced in", ()),
    ("CE clean", ("downstream", "ce", "clean")),
    ("CE increase, nats/token", ("downstream", "ce_increase", "spliced")),
    ("CE recovered, mean ablation", ("downstream", "ce_recovered", "mean")),
    ("CE recovered, zero ablation", ("downstream", "ce_recovered", "zero")),
    ("KL, nats/token", ("downstream", "kl", "spliced")),
    ("against the true dictionary", ()),
    ("matched cosine", ("ground_truth", "matched_cosine")),
    ("support F1", ("ground_truth", "support", "f1")),
    ("exact support rate", ("ground_truth", "support", "exact_support_rate")),
    ("minimum description length", ()),
    ("bits per token", ("mdl", "chosen", "bits_per_token")),
    ("levels a feature is rounded to", ("mdl", "chosen", "levels")),
    ("probing: mean accuracy over kinds of text", ()),
    ("by one feature", ("probing", "accuracy", 0)),
    ("by five features", ("probing", "accuracy", 2)),
    ("by all raw activations", ("probing", "accuracy_of_activations")),
    ("absorption of first letters: means over letters", ()),
    ("words fully absorbed by one feature", ("absorption", "full")),
    ("fraction absorbed", ("absorption", "fraction")),
    ("words on which no main feature fires", ("absorption", "silent")),
    ("F1 of the main features", ("absorption", "f1")),
    ("accuracy by all raw activations", ("absorption", "accuracy_of_activations")),
)


def evaluation_table(results: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The table on screen.

    A column a dictionary, value ± standard error; sections no dictionary has are left out.
    """
    from aen_lightning.evaluate.results import number, table

    rows: list[list[str]] = [
        ["tokens", *(f"{r['features']['n_tokens']:,}" for r in results)],
        ["features", *(f"{r['dictionary']['d_sae']:,}" for r in results)],
    ]
    heading: list[str] | None = None
    for label, path in _SCREEN:
        if not path:
            heading = [label]
            continue
        values = [_at(result, path) for result in results]
        if all(v is None for v in values):
            continue
        if heading is not None:
            rows.append(heading)
            heading = None
        cells = [number(v["value"], v["se"]) if isinstance(v, dict) else number(v) for v in values]
        rows.append([label, *cells])
    return table(rows, header=["", *names])


def _at(result: Any, path: Sequence[Any]) -> Any:
    for key in path:
        if result is None:
            return None
        result = result[key]
    return result
