from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.support.forked import fork_ranks
from tests.support.tiny_models import save_tiny_model


def run(n_ranks: int, folder: Path, *words: str) -> dict[str, Any]:
    output = folder / f"{'_'.join(words)}_{n_ranks}.pt"
    arguments = (str(n_ranks), str(output), *words)
    fork_ranks("tests.support.ddp_training", *arguments, n_ranks=n_ranks, printed=folder / "printed").finish()
    return torch.load(output, weights_only=True)


@pytest.mark.slow
def test_two_processes_equal_one_with_a_gate(tmp_path: Path):
    one, two = (run(n, tmp_path, "aen_gated") for n in (1, 2))
    for name, value in one["state"].items():
        if "metrics" not in name:
            assert_close(two["state"][name], value, rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert one["state"]["tracked.0.sae.l1_weights"].std() > 0.05


@pytest.mark.slow
def test_two_processes_equal_one_on_the_concatenated_batch(tmp_path: Path):
    one, two = (run(n, tmp_path, "aen") for n in (1, 2))
    for name, value in one["state"].items():
        if "metrics" not in name:
            assert_close(two["state"][name], value, rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert two["ema_of_each_rank"].shape[0] == 2
    assert torch.equal(*two["ema_of_each_rank"])
    assert two["n_training_samples"] == one["n_training_samples"] == 40 * 64
    assert one["state"]["tracked.0.sae.l1_weights"].std() > 0.05, "the adaptive weights must be at work"

    per_batch = ("metrics/l0", "metrics/explained_variance", "metrics/mse", "metrics/shrinkage_ratio")
    losses = ("losses/overall_loss", "losses/mse_loss", "losses/l1_loss", "losses/l2_loss")
    for name in (*per_batch, *losses, "sparsity/dead_features_window_pct", "sparsity/dead_features"):
        assert_close(
            two["train_log"][name],
            one["train_log"][name],
            rtol=0,
            atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for name, value in one["val_log"].items():
        assert_close(two["val_log"][name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(two["tracker"]["windows"][""]["n_firings"], one["tracker"]["windows"][""]["n_firings"])
    assert (tmp_path / "sae_2" / "final" / "sae_weights.safetensors").is_file()


@pytest.mark.slow
def test_thresholds_of_a_jumprelu_finish_wait_for_it_and_are_the_same_on_every_rank(tmp_path: Path):
    two = run(2, tmp_path, "aen", "jumprelu")
    assert torch.equal(*two["offsets_of_each_rank"])
    assert two["offsets_of_each_rank"].std() > 1e-3


@pytest.mark.slow
def test_two_processes_read_different_documents_and_make_as_many_model_calls(tmp_path: Path):
    folder, text = save_tiny_model("llama", tmp_path / "model"), tmp_path / "text.jsonl"
    pairs = [
        (4 + i // 20, 30 + i % 20) for i in range(120)
    ]  # a document says one pair of words, which no other has
    documents = [" ".join(f"w{pair[j % 2]}" for j in range(11)) for pair in pairs]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    words = (folder, str(text), str(tmp_path))
    fork_ranks("tests.support.ddp_text", *words, n_ranks=2, printed=tmp_path / "printed").finish()
    rows = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]
    assert rows[0].shape == rows[1].shape
    assert len(rows[0]) >= 12 * 2
    first, second = (
        {tuple(sorted(p)) for p in r.unfold(1, 2, 1).flatten(0, 1).tolist()} & set(pairs) for r in rows
    )
    assert min(len(first), len(second)) > 20
    assert not first & second
