"""Evaluation through Lightning and by the command, and what both refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from aen_lightning import SAEModule
from aen_lightning.callbacks import EvaluateDictionaries
from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.evaluate import (
    evaluate_dictionary,
    load_dictionary,
    saebench_dictionary,
)
from aen_lightning.evaluate.results import number, short_names, table, write_result
from tests.support.commands import evaluate_command
from tests.support.evaluation import (
    CONTEXT,
    D_SAE,
    HF_HOOK,
    HOOK,
    dictionary,
    shard_set,
    text_inputs,
)
from tests.support.shard_sets import HOOK as SHARD_HOOK
from tests.support.tiny_models import D_MODEL, EOS


def lightning_test(
    data: pl.LightningDataModule, tmp_path: Path, sae: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, float]]:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[EvaluateDictionaries(output_dir=str(tmp_path / "out"))],
    )  # fmt: skip
    logged = trainer.test(SAEModule(sae=sae), datamodule=data, verbose=False)[0]
    return json.loads((tmp_path / "out" / "evaluation.json").read_text()), logged


def test_the_callback_evaluates_at_the_end_of_a_test(model_path: str, rows: list[list[int]], tmp_path: Path):
    lm = AutoModelForCausalLM.from_pretrained(model_path)
    data = text_inputs(lm, rows, input_scaling="per_token").data
    result, logged = lightning_test(data, tmp_path, {"architecture": "aen", "d_in": D_MODEL, "d_sae": D_SAE})
    assert result["dictionary"]["normalize_activations"] == "constant_norm_rescale"
    # the module measures in the space it trains in, before export; the evaluation after it: the same numbers
    scaled = result["reconstruction"]["scaled"]
    for name in ("explained_variance", "mse", "shrinkage_ratio"):
        assert scaled[name]["value"] == pytest.approx(logged[f"test/metrics/{name}"], rel=1e-4)
    assert result["sparsity"]["l0"]["value"] == pytest.approx(logged["test/metrics/l0"], rel=1e-5)
    assert result["features"]["dead_pct"] == pytest.approx(logged["test/metrics/dead_features_pct"], abs=1e-4)
    assert logged["test/downstream/kl"] == pytest.approx(result["downstream"]["kl"]["spliced"]["value"])


def test_the_callback_on_synthetic_data_and_on_data_it_does_not_know(tmp_path: Path):
    data = SpikedDataModule(d_in=8, n_features=16, k=2, n_eval_samples=64)
    result, logged = lightning_test(data, tmp_path, {"architecture": "topk", "d_in": 8, "d_sae": 16, "k": 2})
    assert logged["test/ground_truth/matched_cosine"] == pytest.approx(
        result["ground_truth"]["matched_cosine"]
    )
    with pytest.raises(TypeError, match="got NoneType"):
        EvaluateDictionaries()._inputs(None, "cpu")
    with pytest.raises(ValueError, match="n_rows must be at least 1"):
        EvaluateDictionaries(n_rows=0)


def test_load_dictionary_says_what_is_wrong(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with cfg\.json"):
        load_dictionary(tmp_path / "nowhere")
    dictionary("standard").save_model(tmp_path / "run" / "sae")
    with pytest.raises(FileNotFoundError, match=r"no cfg.json\); give one of .*sae"):
        load_dictionary(tmp_path / "run")
    cfg = json.loads((tmp_path / "run" / "sae" / "cfg.json").read_text())
    for change, message in (
        ({"architecture": "nonesuch"}, "holds no dictionary for inference"),
        ({"normalize_activations": "expected_average_only_in"}, "no scale came with it"),
        ({"architecture": "jumprelu"}, "holds no dictionary for inference"),
        ({"normalize_activations": 900 * "\u202e"}, "holds no dictionary for inference"),
    ):
        (tmp_path / "run" / "sae" / "cfg.json").write_text(json.dumps(cfg | change))
        with pytest.raises(ValueError, match=message) as raised:
            load_dictionary(tmp_path / "run" / "sae")
        assert len(str(raised.value)) < 1000


def test_an_average_scale_left_by_saelens_is_folded_in(tmp_path: Path):
    sae = dictionary("standard")
    x = torch.randn(5, D_MODEL)
    expected = sae(4.0 * x) / 4.0
    sae.cfg.normalize_activations = "expected_average_only_in"
    sae.save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 4.0}))
    assert_close(load_dictionary(tmp_path)(x), expected)


def save_for_command(model_path: str, folder: Path, rows: list[list[int]], **metadata: Any) -> Path:
    sae = dictionary("standard", normalize_activations="constant_norm_rescale")
    Dataset.from_dict({"tokens": rows}).to_parquet(folder / "rows.parquet")
    values = {
        "hook_name": HOOK, "model_name": model_path, "model_class_name": "AutoModelForCausalLM", "context_size": CONTEXT,
        "dataset_path": str(folder / "rows.parquet"), "exclude_special_tokens": True, **metadata,
    }  # fmt: skip
    for key, value in values.items():
        sae.cfg.metadata[key] = value
    sae.save_model(folder / "sae")
    return folder / "sae"


def test_evaluate_command_needs_nothing_but_the_folder(
    model_path: str, rows: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = save_for_command(model_path, tmp_path, rows)
    assert evaluate_command([str(folder), "--held-out-documents", "24"]) == 0
    result = json.loads((folder / "evaluation.json").read_text())
    lm = AutoModelForCausalLM.from_pretrained(model_path)
    expected = evaluate_dictionary(load_dictionary(folder), text_inputs(lm, rows), reference=folder)
    for section in ("sparsity", "reconstruction", "downstream"):
        assert json.dumps(result[section]) == json.dumps(expected[section])
    assert result["data"]["n_tokens"] == sum(t != EOS for row in rows[1::2] for t in row)
    text = capsys.readouterr().out
    assert "CE recovered, mean ablation" in text
    assert "matched cosine" not in text

    out = tmp_path / "out.json"
    args = [
        str(folder),
        "--held-out-documents",
        "24",
        "--no-downstream",
        "--per-feature",
        "--out",
        str(out),
        "--split",
        "validation",
    ]
    assert evaluate_command(args) == 0
    result = json.loads(out.read_text())
    assert result["downstream"] is None
    assert len(result["features"]["density"]) == D_SAE
    assert result["data"]["n_tokens"] == sum(t != EOS for row in rows[0::2] for t in row)


def test_evaluate_command_on_shards_and_on_synthetic_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, x, _ = shard_set(tmp_path)
    sae = SAE.from_dict(
        {"architecture": "standard", "d_in": x.shape[1], "d_sae": 24, "metadata": {"hook_name": SHARD_HOOK}}
    )
    sae.save_model(tmp_path / "a")
    assert evaluate_command([str(tmp_path / "a"), "--shards", str(path), "--held-out-fraction", "1"]) == 0
    assert json.loads((tmp_path / "a" / "evaluation.json").read_text())["data"]["kind"] == "shards"

    data = SpikedDataModule(d_in=D_MODEL, n_features=32, k=3, seed=1)
    perfect = SAE.from_dict(
        {"architecture": "standard", "d_in": D_MODEL, "d_sae": 32, "metadata": data.sae_metadata}
    )
    perfect.W_dec.data.copy_(data.feature_vectors)
    perfect.save_model(tmp_path / "b")
    assert evaluate_command([str(tmp_path / "b"), "--n-tokens", "512"]) == 0
    result = json.loads((tmp_path / "b" / "evaluation.json").read_text())
    assert result["ground_truth"]["matched_cosine"] == pytest.approx(1, abs=1e-6)
    assert result["ground_truth"]["support"]["true_l0"] == 3
    assert "matched cosine" in capsys.readouterr().out


def test_evaluate_command_refuses_what_does_not_fit(model_path: str, rows: list[list[int]], tmp_path: Path):
    folder = save_for_command(model_path, tmp_path, rows)
    with pytest.raises(ValueError, match="--out takes one dictionary"):
        evaluate_command([str(folder), str(folder), "--out", "x.json"])
    with pytest.raises(ValueError, match=r"the dictionary has d_in=16, but the inputs are 24 wide"):
        evaluate_command(
            [
                str(folder),
                "--held-out-documents",
                "24",
                "--no-downstream",
                "--hook-name",
                "blocks.1.mlp.hook_post",
            ]
        )
    dictionary("standard").save_model(tmp_path / "bare")
    with pytest.raises(ValueError, match="give --dataset_path"):
        evaluate_command([str(tmp_path / "bare")])
    with pytest.raises(ValueError, match="metadata has no synthetic_data"):
        evaluate_command([str(folder), "--synthetic"])


def test_saebench_gets_unit_atoms_the_same_outputs_and_the_names_it_reads(
    model_path: str, rows: list[list[int]], tmp_path: Path
):
    folder = save_for_command(model_path, tmp_path, rows)
    name, sae = saebench_dictionary(folder)
    assert name == "sae"
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    x = torch.randn(6, D_MODEL)
    assert_close(sae(x), load_dictionary(folder)(x), atol=1e-5, rtol=1e-5)
    # what SAEBench's loader does with a SAELens 6 dictionary: fields of the metadata become attributes of cfg
    for field in ("hook_name", "model_name", "context_size", "exclude_special_tokens"):
        setattr(sae.cfg, field, getattr(sae.cfg.metadata, field))
        assert getattr(sae.cfg, field) is not None
    assert sae.cfg.d_sae == D_SAE
    assert (sae.dtype, sae.device.type) == (torch.float32, "cpu")
    folder = save_for_command(model_path, tmp_path, rows, hook_name=HF_HOOK)
    with pytest.raises(ValueError, match="needs a TransformerLens hook_name"):
        saebench_dictionary(folder)


def test_results_are_written_whole_and_read_well(tmp_path: Path):
    path = write_result({"a": 1.5, "b": None}, tmp_path / "deep" / "x.json")
    assert json.loads(path.read_text()) == {"a": 1.5, "b": None}
    with pytest.raises(ValueError, match="which JSON has not"):
        write_result({"a": float("nan")}, path)
    assert json.loads(path.read_text()) == {"a": 1.5, "b": None}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    assert number(0.123456, 0.00123) == "0.1235 ± 0.0012"
    assert number(None) == "-"
    assert table([["a", "1"], ["head"], ["bb", "22"]]) == "a    1\n\nhead\nbb  22"
    assert short_names(["x/run1/sae", "x/run2/sae"]) == ["run1/sae", "run2/sae"]
    assert short_names(["a", "a"]) == ["1: a", "2: a"]
