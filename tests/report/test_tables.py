from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import save_file

from aen_lightning.report import collect, make_figures, render_report
from aen_lightning.report.result_tables import comparison_tables
from aen_lightning.report.tables import Table, summary_table
from aen_lightning.training.module import SweepModule
from tests.support.commands import compare_command


def test_several_comparisons_are_told_apart(sweep: tuple[Path, SweepModule], tmp_path: Path):
    members = [str(d.folder) for d in collect([sweep[0]]).dictionaries]
    results = [tmp_path / "first.json", tmp_path / "second.json"]
    for result, pair in zip(results, (members[:2], members[2:4]), strict=True):
        compare_command([*pair, "--out", str(result), "--with-dead"])
    report = collect([sweep[0]], results)
    text = render_report(report, make_figures(report))
    ids = re.findall(r'<(?:section|h2|div)[^>]* id="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "an id that two parts have leads to the first of them only"
    assert "(aen compare, 1 of 2)" in text
    assert "(aen compare, 2 of 2)" in text
    for result in results:
        (pair,) = json.loads(result.read_text())["pairs"]
        assert f"{pair['a']} – {pair['b']}" in text
        assert f"{pair['cosine']['mean']:.4g}" in text


def column(table: Table, heading: str) -> list[tuple[str, str]]:
    """Texts and tooltips of a column, by its heading."""
    (at,) = [i for i, cell in enumerate(table.head) if cell.text == heading]
    return [(row[at].text, row[at].tooltip) for row in table.rows]


def test_dead_features_of_a_sweep_are_those_of_its_validation(sweep: tuple[Path, SweepModule]):
    table = summary_table(collect([sweep[0]])).table
    csv = [line.split(",") for line in (sweep[0] / "sweep.csv").read_text().splitlines()]
    at = csv[0].index("dead_features_pct")
    source = "validation, at the end (sweep.csv)"
    assert column(table, "dead, %") == [(f"{float(row[at]):.4g}", source) for row in csv[1:]]


def test_without_a_validation_dead_features_are_told_by_what_there_is(
    sweep: tuple[Path, SweepModule], tmp_path: Path
):
    folder = collect([sweep[0]]).dictionaries[0].folder
    assert folder is not None

    def dead() -> list[tuple[str, str]]:
        return column(summary_table(collect([run])).table, "dead, %")

    run = tmp_path / "run"
    SAE.load_from_disk(folder).save_model(run / "sae" / "final")
    assert dead() == [("-", "")]
    rates = torch.tensor([0.0] * 6 + [0.01] * 18)  # 6 of 24 never fired
    save_file({"sparsity": torch.log10(rates + 1e-10)}, run / "sae" / "final" / "sparsity.safetensors")
    assert dead() == [("25", "last window of training (sparsity.safetensors)")]
    (run / "metrics.csv").write_text(
        "step,metrics/l0,sparsity/dead_features_window_pct\n5,3,50\n10,3,12.5\n15,4,\n"
    )
    assert dead() == [("12.5", "last full window of training")]
    evaluation = {"command": "evaluate", "features": {"dead_pct": 8.25}}
    (run / "sae" / "final" / "evaluation.json").write_text(json.dumps(evaluation))
    assert dead() == [("8.25", "aen evaluate")]
    note = summary_table(collect([run])).note
    assert note.startswith(
        "Metrics are from: last training batch. Where these say nothing of dead features, that is"
    )


@pytest.mark.parametrize(
    ("left_out", "cells"), [(True, ["25 / 50", "25", "50"]), (False, ["-", "-", "-"])], ids=["live", "all"]
)
def test_a_comparison_says_how_many_dead_features_it_left_out(
    dictionary: Path, left_out: bool, cells: list[str]
):
    share = {"0.9": {"of_a": 0.5, "of_b": 0.75}}
    chance: dict[str, Any] = {"cosine": {"mean": 0.1}, "found_again": {"0.9": 0.0}}
    report = collect([dictionary])
    report.comparisons.append(
        {
            "dead_features_left_out": left_out, "n_features": {"a": 24, "b": 24}, "n_compared": {"a": 18, "b": 12},
            "pairs": [{"a": "a", "b": "b", "cosine": {"mean": 0.8}, "found_again": share}],
            "random_baseline": {"a": chance, "b": chance},
        }
    )  # fmt: skip
    (card,) = comparison_tables(report)
    assert [text for text, _ in column(card.table, "dead, %")] == cells
