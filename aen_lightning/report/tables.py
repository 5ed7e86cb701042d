"""The tables of the report, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from aen_lightning.evaluate.results import number
from aen_lightning.report.collect import Report
from aen_lightning.report.naming import colours
from aen_lightning.report.runs import METRICS, Dictionary

# path in the JSON, heading, what it means
_Row = tuple[tuple[str, ...], str, str]
_EVALUATION: tuple[_Row, ...] = (
    (("features", "n_tokens"), "tokens", "on which everything below was measured"),
    (("sparsity", "l0"), "L0", "active features per token"),
    (("features", "dead_pct"), "dead features, %", "never fired on these tokens; falls with more tokens"),
    (("features", "gini"), "Gini of firing rates", "0: all fire equally often, 1: one does all the work"),
    (("reconstruction", "scaled", "explained_variance"), "explained variance, scaled", "every token at equal norm, as in training; 1 is perfect"),
    (("reconstruction", "raw", "explained_variance"), "explained variance, raw", "on the model's own activations; 1 is perfect"),
    (("reconstruction", "raw", "cosine"), "cosine", "between activation and reconstruction; 1 is perfect"),
    (("reconstruction", "scaled", "shrinkage_ratio"), "shrinkage ratio", "size of the reconstruction; below 1: too small"),
    (("downstream", "ce", "clean"), "cross-entropy, clean", "nats per token of the unchanged language model"),
    (("downstream", "ce_increase", "spliced"), "cross-entropy added", "nats per token when the reconstruction is spliced in; 0 is perfect"),
    (("downstream", "ce_recovered", "mean"), "CE recovered (mean ablation)", "1: as good as the activation itself, 0: as bad as its mean"),
    (("downstream", "ce_recovered", "zero"), "CE recovered (zero ablation)", "the same against zero; easier, so closer to 1"),
    (("downstream", "kl", "spliced"), "KL", "nats per token between the predictions; 0 is perfect"),
    (("ground_truth", "matched_cosine"), "matched cosine", "to the true dictionary of synthetic data; 1 is perfect"),
    (("ground_truth", "support", "f1"), "support F1", "whether the true features fire; 1 is perfect"),
)  # fmt: skip
_DIAGNOSIS: tuple[_Row, ...] = (
    (("coherence", "mean"), "nearest |cosine|, mean", "how close features lie; lower is better told apart"),
    (("coherence", "share_above_0.9"), "share with a twin", "features with a neighbour above 0.9"),
    (("active_gram", "condition_number", "p50"), "condition number, median", "of features active together; 1: orthogonal, large: codes are ill determined"),
    (("lipschitz", "encoder", "empirical", "p50"), "encoder steepness, median", "how far the code moves for a small change of the input"),
    (("lipschitz", "encoder", "bound"), "encoder steepness, bound", "no change of the input can exceed it"),
    (("lipschitz", "coding_map", "empirical", "p50"), "exact coding steepness, median", "the same for the exactly solved code"),
    (("coding_gap", "excess_pct", "p50"), "coding gap, % (median)", "by how much the encoder misses the best code's objective; 0 is perfect"),
    (("coding_gap", "l0", "encoder"), "L0 of the encoder", "on the sample solved exactly"),
    (("coding_gap", "l0", "exact"), "L0 of the exact code", "what the objective itself asks for"),
    (("coding_gap", "support", "jaccard"), "support overlap", "between encoder and exact code; 1 is the same features"),
    (("composition", "half_lost_at"), "half lost at", "so many features together, and the encoder misses half of them"),
)  # fmt: skip
_ALWAYS = ("lambda_1", "lambda_2", "gamma", "k")
_SUMMARY = {
    "l0": ("L0", "active features per token"),
    "explained_variance": ("explained variance", "1 is perfect"),
    "mse": ("MSE", "mean over d_in"),
    "shrinkage_ratio": ("shrinkage", "1 is none"),
    "dead_features_pct": ("dead, %", "never fired on the validation data"),
}


def _table(head: Sequence[tuple[str, str]], rows: Sequence[Sequence[tuple[str, str]]], kind: str) -> str:
    """``head``: (heading, hint); cells: (HTML, plain value to sort by)."""
    top = "".join(f'<th title="{escape(hint)}">{heading}<small>{escape(hint)}</small></th>' for heading, hint in head)
    body = "".join(
        "<tr>" + "".join(f'<td data-v="{escape(value)}">{cell}</td>' for cell, value in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _chip(colour: str) -> str:
    return f'<i class="chip" style="background:{colour}"></i>'


def summary_table(report: Report) -> str:
    """A row per dictionary: what it is, the settings that differ, and the metrics at the end; sorted by clicking a heading."""
    dictionaries, colour = report.dictionaries, colours(report.dictionaries)
    keys = list(dict.fromkeys(k for d in dictionaries for k in d.settings))
    shown = [k for k in keys if k != "d_sae" and (k in _ALWAYS or _varies(k, dictionaries))]
    head = [("dictionary", ""), ("kind", ""), ("d_sae", "features"), *((k, "setting") for k in shown)]
    metrics = [m for m in METRICS if any(m in d.metrics for d in dictionaries)]
    head += [_SUMMARY[m] for m in metrics]
    rows = []
    for d in dictionaries:
        full = d.name or str(d.folder or d.run)
        row = [
            (f'<span title="{escape(full)}">{_chip(colour[d.label])}{escape(d.label)}</span>', d.label),
            (escape(d.family), d.family),
        ]
        row.append((f"{d.d_sae:,}" if d.d_sae else "-", str(d.d_sae or "")))
        for k in shown:
            value = d.settings.get(k)
            text = "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
            row.append((escape(text), "" if value is None else str(value)))
        row += [(number(d.metrics.get(m)), repr(d.metrics[m]) if m in d.metrics else "") for m in metrics]
        rows.append(row)
    sources = sorted({d.metrics_source for d in dictionaries if d.metrics})
    note = (
        f"<p class='small'>Metrics are from: {escape('; '.join(sources))}. Click a heading to sort.</p>"
        if sources
        else ""
    )
    return _table(head, rows, "sortable") + note


def _varies(key: str, dictionaries: Sequence[Dictionary]) -> bool:
    """Whether a setting differs inside a family; between families most settings differ because one has them and the other has not."""
    families = {d.family for d in dictionaries}
    values = [{repr(d.settings.get(key)) for d in dictionaries if d.family == f} for f in families]
    return any(len(v) > 1 for v in values)


def result_tables(report: Report) -> str:
    """The results of ``aen evaluate`` and ``aen diagnose``, a column per dictionary, each row explained; empty if there are none."""
    parts = []
    for attribute, rows, title, about in (
        ("evaluation", _EVALUATION, "On held-out data (aen evaluate)", "Values ± standard error. Two dictionaries differ when they are several "
         "standard errors apart; compare them at equal L0."),
        ("diagnosis", _DIAGNOSIS, "Diagnosis (aen diagnose)", "What ails a dictionary beyond its averages; measured on a sample of held-out tokens."),
    ):  # fmt: skip
        mine = [d for d in report.dictionaries if getattr(d, attribute) is not None]
        if mine:
            table = _result_table(mine, [getattr(d, attribute) for d in mine], rows, colours(report.dictionaries))
            parts.append(
                f'<section class="card" id="{attribute}"><h3>{title}</h3><p class="caption">{about}</p>{table}</section>'
            )
    return "".join(parts)


def _result_table(
    mine: Sequence[Dictionary], results: Sequence[dict[str, Any]], rows: Sequence[_Row], colour: dict[str, str]
) -> str:
    body = []
    for path, heading, meaning in rows:
        values = [_at(r, path) for r in results]
        if all(v is None for v in values):
            continue
        cells = [(number(v["value"], v["se"]) if isinstance(v, dict) else _plain(v), "") for v in values]
        body.append([(f"{escape(heading)}<small>{escape(meaning)}</small>", ""), *cells])
    return _table([("", ""), *((_chip(colour[d.label]) + escape(d.label), "") for d in mine)], body, "results")


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value)


def _at(result: Any, path: Sequence[str]) -> Any:
    for key in path:
        if not isinstance(result, dict):
            return None
        result = result.get(key)
    return result


def comparison_tables(report: Report) -> str:
    """Results of ``aen compare``: which share of features is found again in the other dictionary; empty if there are none."""
    parts = []
    n = len(report.comparisons)
    for i, content in enumerate(report.comparisons, 1):
        thresholds = list(content["pairs"][0]["found_again"]) if content["pairs"] else []
        head = [
            ("pair", ""),
            ("mean cosine", "of matched features"),
            *((f"found at {t}", "share of the first / of the second") for t in thresholds),
        ]
        rows = []
        for pair in content["pairs"]:
            shares = [pair["found_again"][t] for t in thresholds]
            cells = [(f"{s['of_a']:.1%} / {s['of_b']:.1%}", str(s["of_a"])) for s in shares]
            mean = pair["cosine"]["mean"]
            rows.append([(f"{escape(pair['a'])} – {escape(pair['b'])}", pair["a"]), (number(mean), str(mean)), *cells])
        for name, chance in (content.get("random_baseline") or {}).items():
            cells = [(f"{chance['found_again'][t]:.1%}", str(chance["found_again"][t])) for t in thresholds]
            mean = chance["cosine"]["mean"]
            rows.append([(f"{escape(name)} – <em>random directions</em>", name), (number(mean), str(mean)), *cells])
        about = (
            "Features of two dictionaries matched one to one by cosine. A feature that another seed finds again is a property of the model; one "
            "that it does not may be an accident of this run. Good: shares far above those of random directions."
        )
        anchor, which = ("comparison", "") if n == 1 else (f"comparison-{i}", f", {i} of {n}")
        parts.append(
            f'<section class="card" id="{anchor}"><h3>Are the same features found again? (aen compare{which})</h3>'
            f'<p class="caption">{about}</p>'
            f"{_table(head, rows, 'sortable')}</section>"
        )
    return "".join(parts)
