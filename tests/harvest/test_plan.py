"""``aen plan``: the numbers against models really built, and against arithmetic by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from aen_lightning.harvest.plan import GIB, plan
from tests.support.tiny_models import save_tiny_model, tiny_config, tiny_model

RECIPES = Path(__file__).parents[2] / "recipes"
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=131072,
)  # fmt: skip


def harvest_config(**model: Any) -> dict[str, Any]:
    return {
        "trainer": {"devices": 1},
        "model": {"model_name": "none", "hook_names": ["blocks.1.hook_resid_post"]} | model,
        "data": {"n_tokens": 1000, "context_size": 32, "batch_size_prompts": 4},
        "shards": {"path": "out", "queue_size": 4},
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "opt"])
def test_parameters_are_those_of_the_cut_model(family: str):
    made = plan(harvest_config(), model_config=tiny_config(family))
    base = tiny_model(family).base_model
    names = ("layers.", "h.", "decoder.layers.")
    kept = [
        p for n, p in base.named_parameters()
        if not n.startswith(("norm.", "ln_f.", "final_layer_norm.", "decoder.final_layer_norm."))
        and not any(n.startswith(f"{prefix}{i}.") for prefix in names for i in (2, 3))
    ]  # fmt: skip
    assert made.numbers["lm_parameters"] == sum(p.numel() for p in kept)
    assert made.numbers["lm_memory_per_rank_gib"] == sum(p.numel() for p in kept) * 4 / GIB


def test_llama_8b_by_hand():
    """The recipe's arithmetic: 17 of 32 blocks, 409.6 M tokens in bf16, 8 ranks."""
    config = yaml.safe_load((RECIPES / "llama-3.1-8b-harvest.yaml").read_text())
    made = plan(config, model_config=LLAMA_8B, tflops_per_s=100.0)
    block = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    n = 17 * (block + 2 * 4096) + 128256 * 4096
    assert made.numbers["lm_parameters"] == n == 4_233_240_576
    assert made.numbers["disk_bytes_per_token"] == 4096 * 2 + 4
    assert made.numbers["disk_gib"] == pytest.approx(409_600_000 * 8196 / GIB)
    assert made.numbers["flops_per_token"] == 17 * (2 * block + 2 * 4096 * 128)
    # a share of the weights, and the embedding gathered, which is larger than two blocks
    assert made.numbers["lm_memory_per_rank_gib"] == pytest.approx(
        (2 * n / 8 + 2 * 128256 * 4096) / GIB, rel=1e-3
    )
    rate = 8 * 100e12 / made.numbers["flops_per_token"]
    assert made.numbers["tokens_per_s"] == pytest.approx(rate)
    assert made.numbers["hours"] == pytest.approx(409_600_000 / rate / 3600)


def test_float32_and_several_hooks():
    hooks = ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"]
    made = plan(
        harvest_config(hook_names=hooks, model_dtype="bfloat16", dtype="float32"),
        model_config=tiny_config("llama"),
    )
    assert made.numbers["disk_bytes_per_token"] == (16 + 24) * 4 + 4
    assert made.numbers["batches_in_flight_per_rank_gib"] == 6 * 4 * 32 * 164 / GIB


def test_model_config_is_found_by_name(tmp_path: Path):
    path = save_tiny_model("llama", tmp_path)
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).parameters())
    assert 0 < plan(harvest_config(model_name=path)).numbers["lm_parameters"] < whole


def test_fit_by_hand():
    config = {
        "trainer": {"devices": 2, "max_steps": 100},
        "model": {"sae": {"architecture": "aen", "d_in": 8, "d_sae": 32}},
        "data": {
            "class_path": "aen_lightning.data.ActivationsDataModule",
            "init_args": {"train_batch_size_tokens": 64},
        },
    }
    made = plan(config, tflops_per_s=1.0)
    n = 2 * 8 * 32 + 8 + 32
    assert made.numbers["sae_parameters"] == n
    assert made.numbers["adam_per_rank_gib"] == 2 * 4 * n / GIB
    assert made.numbers["flops_per_token"] == 10 * 8 * 32
    assert made.numbers["tokens"] == 100 * 64 * 2
    assert "plan of aen fit" in str(made)


def test_fit_on_live_text_counts_the_language_model():
    config = {
        "model": {"sae": {"architecture": "standard", "d_in": 16, "d_sae": 32}},
        "data": {
            "init_args": {"model_name": "none", "hook_name": "blocks.1.hook_resid_post", "context_size": 32}
        },
    }
    made = plan(config, model_config=tiny_config("llama"))
    assert made.numbers["flops_per_token"] == made.numbers["lm_flops_per_token"] + 10 * 16 * 32
    assert any("one device a node" in note for note in made.notes)


def test_table_shows_every_number():
    made = plan(harvest_config(), model_config=tiny_config("llama"), tflops_per_s=0.5)
    assert all(name in str(made) for name in made.numbers)


@pytest.mark.parametrize(
    ("config", "kwargs", "message"),
    [
        ({}, {}, "cannot plan this config"),
        ({"model": {"lr": 1}}, {}, "with model keys lr"),
        (harvest_config(), {"tflops_per_s": 0.0}, "tflops_per_s must be above 0"),
        (harvest_config(hook_names=["blocks.7.hook_resid_post"]), {}, "the model has 4 layers"),
    ],
)
def test_bad_configs_are_named(config: dict[str, Any], kwargs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        plan(config, model_config=tiny_config("llama"), **kwargs)


def test_the_step_on_a_gpu_by_hand():
    """Llama in bf16 on an H100: five products at 720 TFLOP/s alone take 30.5 ms; Adam moves 28 bytes a parameter."""
    config = yaml.safe_load((RECIPES / "llama-3.1-8b.yaml").read_text())
    config["data"] = {"train_batch_size_tokens": 4096}
    numbers = plan(config).numbers
    products = 5 * 2 * 4096 * 4096 * 131072 / 720e12
    adam = 28 * 2 * 4096 * 131072 / 3e12
    assert 1e3 * (products + adam) < numbers["h100_dense_step_ms"] < 1.5e3 * (products + adam)
    assert 1e3 * (products / 5 + adam) < numbers["h100_sparse_step_ms"] < 1.5e3 * (products / 5 + adam)
    # weights, gradient and two moments in float32, and the copies in bf16
    assert numbers["h100_sparse_step_gib"] == pytest.approx(2 * 4096 * 131072 * (16 + 2) / GIB, rel=0.02)
