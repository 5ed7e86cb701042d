"""Live text with sharded features: the language model's work is split over the ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.support.ranks import run_ranks
from tests.support.sharded_text import train
from tests.support.text import documents
from tests.support.tiny_models import save_tiny_model


@pytest.mark.slow
def test_each_rank_runs_its_share_of_the_rows_and_trains_on_all(tmp_path: Path) -> None:
    folder, text = save_tiny_model("llama", tmp_path / "model"), tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents(120)))
    train(folder, str(text), tmp_path, n_ranks=1)
    run_ranks("tests.support.sharded_text", folder, str(text), str(tmp_path), n_ranks=2)
    whole = torch.load(tmp_path / "rank_0_of_1.pt", weights_only=True)
    parts = [torch.load(tmp_path / f"rank_{r}_of_2.pt", weights_only=True) for r in range(2)]
    # calls of three rows are two and two on the ranks, the last of which repeats the third
    first = whole["rows"][:3]
    assert torch.equal(parts[0]["rows"][:2], first[:2])
    assert torch.equal(parts[1]["rows"][:2], first[[2, 2]])
    assert all(part["calls"] == [-(-n // 2) for n in whole["calls"]] for part in parts)
    for name, value in whole["state"].items():
        # the model runs in float32, and other row counts round otherwise
        assert_close(parts[0]["state"][name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(parts[0]["state"][name], parts[1]["state"][name]), name
