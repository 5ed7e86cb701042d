"""``aen evaluate``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from aen_lightning.cli.inputs import InputOpener, add_input_arguments, device_of
from aen_lightning.evaluate.dictionary import load_dictionary
from aen_lightning.evaluate.evaluate import RESULT_FILE, evaluate_dictionary
from aen_lightning.evaluate.results import number, result_path, short_names, table, write_result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aen evaluate",
        description="How good a SAELens dictionary is on held-out data: sparsity, reconstruction, dead features, how evenly they are "
        "used, and what splicing it in costs the language model. Writes evaluation.json into the dictionary's folder.",
    )
    parser.add_argument("dictionary", nargs="+", help="folder with cfg.json, or RELEASE:ID as for SAE.from_pretrained")
    parser.add_argument("--json", metavar="FILE", help="write the result here (one dictionary only)")
    parser.add_argument(
        "--no-downstream", action="store_true", help="no CE and KL; the language model is cut after the hook"
    )
    parser.add_argument(
        "--n-downstream-rows", type=int, default=64, metavar="N",
        help="rows for CE and KL, which take four passes of the whole model each (default: 64; 0: as many as for the rest)",
    )  # fmt: skip
    parser.add_argument(
        "--downstream-batch-size-prompts",
        type=int,
        default=4,
        metavar="N",
        help="rows a call of the whole model (default: 4)",
    )
    parser.add_argument(
        "--ablate", choices=("all", "counted"), default="all",
        help="ablations replace every position, as in SAELens (all), or those the dictionary replaces (counted)",
    )  # fmt: skip
    parser.add_argument("--per-feature", action="store_true", help="add every feature's density to the JSON")
    add_input_arguments(parser, n_rows=256)
    return parser


def evaluate_command(args: Sequence[str]) -> int:
    """``aen evaluate DICTIONARY... [options]``; returns the exit code.

    Raises:
        ValueError: Or OSError, with one clear line, for what cannot be evaluated.
    """
    options = _parser().parse_args(args)
    if options.json is not None and len(options.dictionary) > 1:
        raise ValueError("--json takes one dictionary; several are written to evaluation.json in their own folders")
    opener = InputOpener(options, whole_lm=not options.no_downstream)
    results = []
    for reference in options.dictionary:
        sae = load_dictionary(reference, device=device_of(options), dtype=options.dtype)
        result = evaluate_dictionary(
            sae,
            opener.open(sae),
            reference=reference,
            n_downstream_rows=options.n_downstream_rows or None,
            downstream_batch_size_prompts=options.downstream_batch_size_prompts,
            ablate=options.ablate,
            per_feature=options.per_feature,
        )
        results.append(result)
        # one by one, so that an error in the next takes nothing away
        if (path := result_path(reference, options.json, RESULT_FILE)) is not None:
            write_result(result, path)
            print(f"wrote {path}")
    print(evaluation_table(results, short_names(options.dictionary)))
    return 0


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
)


def evaluation_table(results: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The table on screen: a column a dictionary, value ± standard error; sections no dictionary has are left out."""
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


def _at(result: Any, path: Sequence[str]) -> Any:
    for key in path:
        if result is None:
            return None
        result = result[key]
    return result
