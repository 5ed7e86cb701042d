from __future__ import annotations

import json
from pathlib import Path

import pytest

from aen_lightning.runs import collect_provenance, find_dictionaries, scrub, training_settings
from aen_lightning.saes.export import export_sae
from tests.support.runs import D_IN, D_SAE, make_run, trained


def test_each_dictionary_of_a_run_gets_its_own_numbers(tmp_path: Path):
    for name in ("a", "b"):
        export_sae(trained(), tmp_path / "sae" / "final" / name)
    (tmp_path / "metrics.csv").write_text(
        "step,a/metrics/l0,b/metrics/l0,val/a/metrics/l0,b/val/metrics/l0,details/n_training_samples\n9,1,2,3,4,64\n"
    )
    a, b = (collect_provenance(d) for d in find_dictionaries(tmp_path))
    assert (a["training_metrics"], a["evaluation"]) == ({"metrics/l0": 1.0}, {"l0": 3.0})
    assert (b["training_metrics"], b["evaluation"]) == ({"metrics/l0": 2.0}, {"l0": 4.0})
    assert (a["n_training_samples"], a["n_training_steps"]) == (64, 10)


def test_numbers_that_json_has_not_are_left_out(tmp_path: Path):
    run = make_run(tmp_path)
    (run / "metrics.csv").write_text("step,metrics/l0,metrics/mse,val/metrics/l0\n1,2,nan,inf\n")
    found = collect_provenance(find_dictionaries(run)[0])
    assert found["training_metrics"] == {"metrics/l0": 2.0}
    assert "evaluation" not in found
    json.dumps(found, allow_nan=False)


def test_what_a_dictionary_knows_of_itself_stays_without_its_run(tmp_path: Path):
    export_sae(trained(), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    cfg["metadata"]["provenance"] = {"seed": 3, "evaluation": {"l0": 5.0}}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    found = collect_provenance(find_dictionaries(tmp_path)[0])
    assert (found["seed"], found["evaluation"]) == (3, {"l0": 5.0})


def test_settings_are_in_the_papers_units(tmp_path: Path):
    export_sae(trained(l1_coefficient=0.4, l2_coefficient=0.08, gamma=0.5), tmp_path)
    settings = training_settings(find_dictionaries(tmp_path)[0])
    assert (settings["d_in"], settings["d_sae"], settings["gamma"]) == (D_IN, D_SAE, 0.5)
    assert settings["lambda_1"] == pytest.approx(0.05)  # 0.4 / 8: SAELens sums over d_in, the paper averages
    assert settings["lambda_2"] == pytest.approx(0.01)
    assert "l1_coefficient" not in settings


def test_secrets_and_local_paths_are_scrubbed():
    assert scrub({"n_tokens": 5, "sequence_separator_token": 3, "max_tokens": "8"}) == {
        "n_tokens": 5, "sequence_separator_token": 3, "max_tokens": "8",
    }  # fmt: skip
    assert scrub(
        {"hf_token": "abc", "list": ["hf_" + "a" * 20, Path("/home/me/text.jsonl"), "../x"], "model": "a/b"}
    ) == {"list": ["(removed)", "text.jsonl", "x"], "model": "a/b"}
