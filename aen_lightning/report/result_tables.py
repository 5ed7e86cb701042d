"""The tables of what other commands found about the dictionaries of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aen_lightning.evaluate.results import number
from aen_lightning.files.checked import shortened
from aen_lightning.report.collect import Report
from aen_lightning.report.tables import Cell, Table, TableCard, value_cell
from aen_lightning.report.trained import TrainedSAE

# keys in the JSON that lead to it, heading, what it means
_Row = tuple[str, str, str]
_EVALUATION: tuple[_Row, ...] = (
    ("features/n_tokens", "tokens", "on which everything below was measured"),
    ("sparsity/l0", "L0", "active features per token"),
    ("features/dead_pct", "dead features, %", "never fired on these tokens; falls with more tokens"),
    ("features/gini", "Gini of firing rates", "0: all fire equally often, 1: one does all the work"),
    ("reconstruction/scaled/explained_variance", "explained variance, scaled",
     "every token at equal norm, as in training; 1 is perfect"),
    ("reconstruction/raw/explained_variance", "explained variance, raw",
     "on the model's own activations; 1 is perfect"),
    ("reconstruction/raw/cosine", "cosine", "between activation and reconstruction; 1 is perfect"),
    ("reconstruction/scaled/shrinkage_ratio", "shrinkage ratio",
     "size of the reconstruction; below 1: too small"),
    ("downstream/ce/clean", "cross-entropy, clean", "nats per token of the unchanged language model"),
    ("downstream/ce_increase/spliced", "cross-entropy added",
     "nats per token when the reconstruction is spliced in; 0 is perfect"),
    ("downstream/ce_recovered/mean", "CE recovered (mean ablation)",
     "1: as good as the activation itself, 0: as bad as its mean"),
    ("downstream/ce_recovered/zero", "CE recovered (zero ablation)",
     "the same against zero; easier, so closer to 1"),
    ("downstream/kl/spliced", "KL", "nats per token between the predictions; 0 is perfect"),
    ("ground_truth/matched_cosine", "matched cosine",
     "to the true dictionary of synthetic data; 1 is perfect"),
    ("ground_truth/support/f1", "support F1", "whether the true features fire; 1 is perfect"),
)  # fmt: skip
_DIAGNOSIS: tuple[_Row, ...] = (
    ("coherence/mean", "nearest |cosine|, mean", "how close features lie; lower is better told apart"),
    ("coherence/share_above_0.9", "share with a twin", "features with a neighbour above 0.9"),
    ("active_gram/condition_number/p50", "condition number, median",
     "of features active together; 1: orthogonal, large: codes are ill determined"),
    ("lipschitz/encoder/empirical/p50", "encoder steepness, median",
     "how far the code moves for a small change of the input"),
    ("lipschitz/encoder/bound", "encoder steepness, bound", "no change of the input can exceed it"),
    ("lipschitz/coding_map/empirical/p50", "exact coding steepness, median",
     "the same for the exactly solved code"),
    ("coding_gap/excess_pct/p50", "coding gap, % (median)",
     "by how much the encoder misses the best code's objective; 0 is perfect"),
    ("coding_gap/l0/encoder", "L0 of the encoder", "on the sample solved exactly"),
    ("coding_gap/l0/exact", "L0 of the exact code", "what the objective itself asks for"),
    ("coding_gap/support/jaccard", "support overlap",
     "between encoder and exact code; 1 is the same features"),
    ("composition/half_lost_at", "half lost at",
     "so many features together, and the encoder misses half of them"),
)  # fmt: skip
_EVALUATION_CAPTION = (
    "Values ± standard error. Two dictionaries differ when they are several standard errors apart; compare "
    "them at equal L0."
)
_DIAGNOSIS_CAPTION = "What ails a dictionary beyond its averages; measured on a sample of held-out tokens."
_COMPARISON_CAPTION = (
    "Features of two dictionaries matched one to one by cosine. A feature that another seed finds again is "
    "a property of the model; one that it does not may be an accident of this run. Good: shares far above "
    "those of random directions."
)


def result_tables(report: Report) -> list[TableCard]:
    """The results of ``aen evaluate`` and ``aen diagnose``, a column per SAE, each row explained."""
    cards = []
    for attribute, rows, title, caption in (
        ("evaluation", _EVALUATION, "On held-out data (aen evaluate)", _EVALUATION_CAPTION),
        ("diagnosis", _DIAGNOSIS, "Diagnosis (aen diagnose)", _DIAGNOSIS_CAPTION),
    ):
        mine = [d for d in report.dictionaries if getattr(d, attribute) is not None]
        if mine:
            table = _result_table(mine, [getattr(d, attribute) for d in mine], rows)
            cards.append(TableCard(attribute, title, table, caption))
    return cards


def _result_table(
    saes: Sequence[TrainedSAE], results: Sequence[dict[str, Any]], rows: Sequence[_Row]
) -> Table:
    body = []
    for path, heading, meaning in rows:
        values = [_at(result, path.split("/")) for result in results]
        if any(value is not None for value in values):
            cells = [Cell(_plain(v, f"{d.folder}: {path}")) for v, d in zip(values, saes, strict=True)]
            body.append([Cell(heading, hint=meaning), *cells])
    return Table([Cell(""), *(Cell(d.label, label=d.label) for d in saes)], body, sortable=False)


def _plain(value: Any, where: str) -> str:
    """A number or an estimate of :mod:`aen_lightning.evaluate`, for people.

    Raises:
        ValueError: If it is neither.
    """
    parts = [value.get("value"), value.get("se")] if isinstance(value, dict) else [value]
    if not all(part is None or isinstance(part, int | float) for part in parts):
        raise ValueError(f"{where}: expected a number or an estimate, got {shortened(value)}")
    if isinstance(value, dict):
        return number(*parts)
    return f"{value:,}" if isinstance(value, int) else number(value)


def _at(result: Any, path: Sequence[str]) -> Any:
    for key in path:
        if not isinstance(result, dict):
            return None
        result = result.get(key)
    return result


def comparison_tables(report: Report) -> list[TableCard]:
    """Results of ``aen compare``: which share of features is found again in the other dictionary."""
    n = len(report.comparisons)
    cards = []
    for i, comparison in enumerate(report.comparisons, 1):
        anchor, which = ("comparison", "") if n == 1 else (f"comparison-{i}", f", {i} of {n}")
        title = f"Are the same features found again? (aen compare{which})"
        cards.append(TableCard(anchor, title, _comparison_table(comparison), _COMPARISON_CAPTION))
    return cards


def _comparison_table(comparison: dict[str, Any]) -> Table:
    pairs, dead = comparison["pairs"], _dead_left_out(comparison)
    thresholds = list(pairs[0]["found_again"]) if pairs else []
    head = [Cell("pair"), Cell("mean cosine", hint="of matched features")]
    head += [Cell(f"found at {t}", hint="share of the first / of the second") for t in thresholds]
    head.append(Cell("dead, %", hint="of the first / of the second, left out"))
    rows = []
    for pair in pairs:
        a, b = pair["a"], pair["b"]
        row = [Cell(f"{a} – {b}", a), value_cell(pair["cosine"]["mean"])]
        for shares in (pair["found_again"][t] for t in thresholds):
            row.append(Cell(f"{shares['of_a']:.1%} / {shares['of_b']:.1%}", repr(shares["of_a"])))
        known = a in dead and b in dead
        row.append(Cell(f"{number(dead[a])} / {number(dead[b])}", repr(dead[a])) if known else Cell("-"))
        rows.append(row)
    for name, chance in (comparison.get("random_baseline") or {}).items():
        row = [Cell(f"{name} – ", name, emphasis="random directions"), value_cell(chance["cosine"]["mean"])]
        row += [Cell(f"{share:.1%}", repr(share)) for share in (chance["found_again"][t] for t in thresholds)]
        rows.append([*row, value_cell(dead.get(name))])
    return Table(head, rows)


def _dead_left_out(comparison: dict[str, Any]) -> dict[str, float]:
    """Percent of each dictionary's features that never fired and were not compared; empty if all were."""
    if not comparison.get("dead_features_left_out"):
        return {}
    compared = comparison["n_compared"]
    return {name: 100 * (1 - compared[name] / n) for name, n in comparison["n_features"].items()}
