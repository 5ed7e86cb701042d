"""``aen plan`` reads a recipe as the command that runs it would."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from aen_lightning.cli.main import main
from aen_lightning.cli.plan import known_model
from aen_lightning.cli.recipes import recipes


def planned(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, float]:
    assert main(["plan", *args]) == 0
    rows = re.findall(r"^(\w+) +([\d,.]+)$", capsys.readouterr().out, re.MULTILINE)
    return {name: float(value.replace(",", "")) for name, value in rows}


@pytest.mark.parametrize("name", [n for n in recipes() if not n.endswith(("sweep", "refit"))])
def test_our_recipes_are_planned_without_a_network(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, "--config", name)["flops_per_token"] > 0  # HF_HUB_OFFLINE is set for every test


def test_values_are_overridden_as_for_fit(capsys: pytest.CaptureFixture[str]) -> None:
    once = planned(capsys, "--config", "debug", "--tflops_per_s", "2")
    assert once["sae_parameters"] == 2 * 32 * 64 + 32 + 64
    assert once["tokens"] == 300 * 128
    assert once["tokens_per_s"] == pytest.approx(2e12 / (10 * 32 * 64), rel=1e-3)
    more = planned(capsys, "--config", "debug", "--trainer.devices=4", "--data.train_batch_size_tokens", "10")
    assert more["tokens"] == 4 * 300 * 10
    assert (more["ranks"], more["effective_batch_tokens"]) == (4, 40)


def test_the_memory_of_a_rank_is_the_sum_of_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = planned(capsys, "--config", "smollm2-135m")
    parts = {n: v for n, v in numbers.items() if n.endswith("_per_rank_gib") and n != "memory_per_rank_gib"}
    assert len(parts) == 5
    assert numbers["memory_per_rank_gib"] == pytest.approx(sum(parts.values()), abs=3e-3)


MEASURED = {
    "device": "NVIDIA H100 80GB HBM3",
    "dry_run": False,
    "ceilings": {"copy_tb_per_s": 2.9},
    "steps": [
        {
            "name": "ours, dense", "shape": [4096, 4096, 131072], "l0": 64.0, "firing": "uniform", "ms": 84.0,
            "steps_per_s": 11.9, "operations": 60, "syncs": 0, "peak_gib": 21.5, "predicted_ms": 56.0,
            "predicted_gib": 20.0,
        },
        {
            "name": "another card", "shape": [8192, 512, 4096], "l0": 225.0, "firing": "heavy", "ms": 1,
            "predicted_ms": None, "predicted_gib": 1.0, "peak_gib": None,
        },
    ],
}  # fmt: skip


def test_measured_steps_stand_beside_their_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(MEASURED))
    assert main(["plan", "--config", "debug", "--measured", str(tmp_path / "gpu.json")]) == 0
    text = capsys.readouterr().out
    assert "sae_parameters" in text
    assert "measured on: NVIDIA H100 80GB HBM3" in text
    assert re.search(r"ours, dense +4096, 4096, 131072 +64 uniform +56\.00 +84\.00 +1\.50\n", text)
    assert re.search(r"another card +8192, 512, 4096 +225 heavy +- +1\.00 +-\n", text)
    assert "dry run" not in text
    assert main(["plan", "--config", "debug", "--measured", str(tmp_path / "gpu.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["measured"]
    assert [step["measured_over_predicted"] for step in found] == [1.5, None]
    assert found[0]["shape"] == [4096, 4096, 131072]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("[1]", "not a file of `benchmarks/gpu_step.py --json`"),
        ('{"steps": []}', "not a file of `benchmarks/gpu_step.py --json`.*device"),
        (json.dumps(MEASURED).replace("84.0", "-1.0"), r"gpu_step.py --json`.*steps.*ms"),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "gpu.json").write_text(content)
    assert main(["plan", "--config", "debug", "--measured", str(tmp_path / "gpu.json")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(message, captured.err), captured.err
    assert len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "n_parameters"),
    [
        # the whole models, as their cards count them: input and output embeddings once where they are tied
        ("openai-community/gpt2", 124_439_808),
        ("EleutherAI/pythia-70m-deduped", 70_426_624),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("models/smollm2-135m", 134_515_008),
    ],
)
def test_shapes_of_the_models_in_our_recipes(name: str, n_parameters: int) -> None:
    config = known_model({"model": {"model_name": name}})
    assert config is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert model.num_parameters() == n_parameters


def test_a_model_of_ones_own_is_not_guessed() -> None:
    assert known_model({"model": {"model_name": "somebody/else"}}) is None
    assert known_model({"model": {}, "data": None}) is None
