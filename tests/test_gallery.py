"""The dictionary in the repository is what its page says, loads without this package, and could be published as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

from aen_lightning.cli.main import main

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "gallery" / "smollm2-135m-layer14"


def test_it_loads_in_saelens_with_no_dead_feature():
    sae = SAE.load_from_disk(FOLDER)
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (576, 2304)
    torch.manual_seed(0)
    acts = sae.encode(150 * torch.nn.functional.normalize(torch.randn(64, 576), dim=1))
    assert 0 < float((acts > 0).sum(1).float().mean()) < 500
    assert all(bool(p.isfinite().all()) for p in sae.parameters())


def test_its_page_says_what_was_measured():
    page = (ROOT / "docs" / "gallery" / "index.md").read_text(encoding="utf-8")
    found = json.loads((FOLDER / "evaluation.json").read_text(encoding="utf-8"))
    space = found["reconstruction"]["scaled"]
    assert f"| L0 | {found['sparsity']['l0']['value']:.1f} |" in page
    assert f"| explained variance | {space['explained_variance']['value']:.4f} |" in page
    assert (
        f"| dead features | {found['features']['dead_pct']:.2g} % of {found['features']['n_tokens']:,} tokens |"
        in page
    )


def test_it_would_be_published_as_it_is(capsys: pytest.CaptureFixture[str]):
    assert main(["push", str(FOLDER), "me/sae", "--dry_run"]) == 0
    assert "sae_weights.safetensors" in capsys.readouterr().out
