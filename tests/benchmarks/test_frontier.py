from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

from aen_lightning.callbacks import TargetL0


@pytest.fixture
def frontier(load_script):
    return load_script("frontier")


def test_calibrated_thresholds_give_the_asked_l0(frontier):
    torch.manual_seed(0)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=40, normalize_activations="constant_norm_rescale"))
    sae.W_enc.data.normal_()
    sae.threshold.data.fill_(0.3)
    sae.turn_off_forward_pass_hook_z_reshaping()
    x = 100 * torch.randn(500, 8)  # raw: the SAE scales them to norm sqrt(8) itself
    factor = frontier.calibrate(sae, x, 6.0)
    assert sae.threshold.unique().item() == pytest.approx(0.3 * factor)
    # one activation sits on the threshold, which JumpReLU leaves out
    assert int(sae.encode(x).count_nonzero()) == 6 * 500 - 1


def test_results_are_averaged_over_seeds_and_their_spread_is_shown(frontier):
    row = {
        "variant": "recommended",
        "d_sae": 2304,
        "target_l0": 32.0,
        "l0": 32.0,
        "ce_recovered": 0.9,
        "dead_pct": 0.0,
    }
    line = frontier.table([row | {"ev": 0.80, "seed": 0}, row | {"ev": 0.82, "seed": 1}]).splitlines()[1]
    assert line.split() == ["recommended", "2304", "32.0", "2", "0.8100", "0.0200", "0.9000", "0.00"]


def test_the_default_text_is_the_docstrings_of_installed_packages(frontier, tmp_path: Path):
    import frontier_data

    file = frontier_data.docstrings(tmp_path / "text.jsonl.gz", 20_000)
    with gzip.open(file, "rt") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    assert 20_000 <= sum(map(len, documents)) <= 20_000 + 8000
    assert max(map(len, documents)) <= 8000
    assert len(set(documents)) == len(documents)


def test_every_variant_is_a_config_that_saelens_accepts(frontier):
    for name, make in frontier.VARIANTS.items():
        run = make(16.0, 100)
        module = frontier.SAEModule({"d_in": 8, "d_sae": 32, **run.sae}, seed=0, lr=run.lr, **run.training)
        norms = module.sae.W_dec.norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms), msg=name)  # the same start for all
        torch.testing.assert_close(module.sae.W_enc, module.sae.W_dec.T, msg=name)


def test_settings_of_a_variant_are_changed_by_name(frontier):
    run = frontier.VARIANTS["recommended"](16.0, 100)
    for setting in (
        "start.l0=64",
        "HardFinish.at=0.5",
        "TargetL0.reach_at=0.1",
        "aux_loss_window=.1",
        "penalty=mcp",
        "decay=0.4",
        "lr=2e-3",
    ):
        run.change(setting)
    target, finish = run.callbacks
    assert (run.start.l0, target.reach_at, finish.at, run.decay, run.lr) == (64, 0.1, 0.5, 0.4, 0.002)
    assert (run.sae["aux_loss_window"], run.sae["penalty"]) == (0.1, "mcp")
    with pytest.raises(SystemExit, match=r"this variant has no HardFinish\.at"):
        frontier.VARIANTS["batchtopk"](16.0, 100).change("HardFinish.at=0.5")


@pytest.mark.parametrize(
    ("l0", "d_sae", "start"),
    [(16.0, 2304, 32.0), (64.0, 9216, 128**2 / 96), (128.0, 2304, 256.0), (128.0, 9216, 460.8)],
)
def test_the_preset_starts_with_twice_its_l0_or_more_where_it_is_held_lower(
    frontier, l0: float, d_sae: int, start: float
):
    run = frontier.VARIANTS["recommended"](l0, 100)
    assert run.start.l0 == "target"
    target = next(callback for callback in run.callbacks if isinstance(callback, TargetL0))
    assert target.start_l0(576, d_sae) == pytest.approx(start)
    assert frontier.VARIANTS["batchtopk"](l0, 100).start.active_share == 0.05
