from __future__ import annotations

import json
import math

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from aen_lightning.data import SpikedDataModule


@pytest.fixture
def script(load_script):
    return load_script("replicate_spiked")


def test_published_numbers_cover_every_setting_at_the_published_rhos(script):
    published = script.read_published()
    assert set(published) == {(name, rho) for name in script.SETTINGS for rho in (0.0, 0.3, 0.5, 0.7, 0.9)}
    assert published["aen-weak", 0.0]["l0"] == 54.66797
    assert published["topk-64", 0.9]["dead_pct_window"] == 93.45703
    assert published["topk-64", 0.9]["mse"] == 0.01603


@pytest.mark.parametrize(
    ("metric", "published", "ours", "expected"),
    [
        ("l0", 50.0, [52.0], 2.5),
        ("l0", 10.0, [10.0], 1.0),
        ("explained_variance", 0.8, [0.70, 0.70], 0.02),
        # std of 0.1 and 0.3 is 0.1 sqrt 2; times 2 sqrt(1 + 1/2) is 0.2 sqrt 3
        ("explained_variance", 0.8, [0.1, 0.3], 0.2 * math.sqrt(3)),
    ],
)
def test_tolerance_is_the_larger_of_the_fixed_one_and_that_of_the_seeds(
    script, metric, published, ours, expected
):
    assert script.tolerance(metric, published, ours) == pytest.approx(expected)


def test_a_cell_agrees_within_its_tolerance_only(script):
    row = {
        "setting": "aen-weak",
        "rho": 0.0,
        "seed": 0,
        "explained_variance": 0.88,
        "mcc": 1,
        "support_f1": 1,
    }
    row |= {"l0": 52.1, "dead_pct_window": 2.5, "shrinkage_ratio": 0.85}
    published = {
        ("aen-weak", 0.0): {
            "l0": 50.0,
            "explained_variance": 0.85,
            "dead_pct_window": 0.0,
            "shrinkage_ratio": 0.86,
        }
    }
    cells = script.compare([row], published)
    assert {cell["metric"]: cell["agrees"] for cell in cells} == {
        "l0": True,
        "explained_variance": False,
        "dead_pct_window": False,
        "shrinkage_ratio": True,
    }
    assert "0.880 (0.850) **!**" in script.table([row], cells)


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_variance_of_the_data_is_that_of_many_samples(script, rho):
    x, _ = SpikedDataModule(d_in=256, n_features=1024, rho=rho, seed=3).sample(65536, stream=5, index=0)
    assert script.data_variance(rho, 3) == pytest.approx(float(x.double().var(dim=0).mean()), rel=5e-3)


def test_the_published_mse_makes_an_ev_with_the_variance_of_our_seeds(script):
    samples = [
        SpikedDataModule(d_in=256, n_features=1024, rho=0.9, seed=seed).sample(65536, stream=5, index=0)[0]
        for seed in (0, 1)
    ]
    variance = sum(float(x.double().var(dim=0).mean()) for x in samples) / 2
    rows = [
        {"setting": "topk-16", "rho": 0.9, "seed": seed, **dict.fromkeys(script.TOLERANCES, 0.8)}
        for seed in (0, 1)
    ]
    published = {("topk-16", 0.9): {**dict.fromkeys(script.TOLERANCES, 0.7), "mse": 0.01}}
    of_all = {cell["metric"]: cell.get("published_of_all") for cell in script.compare(rows, published)}
    assert of_all.pop("explained_variance") == pytest.approx(1 - 0.01 / variance, abs=1e-3)
    assert set(of_all.values()) == {None}


def test_what_is_not_published_is_not_judged(script):
    row = {"setting": "aen-weak", "rho": 0.1, "seed": 0, "mcc": 1, "support_f1": 1}
    row |= dict.fromkeys(script.TOLERANCES, 1.0)
    assert {cell["agrees"] for cell in script.compare([row], {})} == {None}


def test_measures_of_a_dictionary_that_is_the_truth_scaled_down(script):
    sae = StandardSAE(StandardSAEConfig(d_in=3, d_sae=3))
    sae.W_enc.data = torch.eye(3)
    sae.W_dec.data = torch.eye(3)
    true_acts = torch.tensor([[2.0, 0, 0], [0, 4.0, 0], [0, 0, 6.0]])
    sae.W_enc.data *= 0.5  # everything comes back at half its size: a quarter of the variance is lost
    found = script.measure(sae, true_acts, true_acts, torch.eye(3))
    assert found["explained_variance"] == pytest.approx(0.75)
    assert found["shrinkage_ratio"] == pytest.approx(0.5)
    assert found["l0"] == 1.0
    assert found["mcc"] == found["support_f1"] == found["found_at_0.9"] == pytest.approx(1.0)


def test_it_runs_resumes_and_writes(script, tmp_path, capsys):
    base = ["--settings", "aen-weak", "topk-16", "--out", str(tmp_path / "runs"), "--checkpoint-every", "5"]
    script.main([*base, "--steps", "10", "--json", str(tmp_path / "a.json")])
    first = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [run["setting"] for run in first["runs"]] == ["aen-weak", "topk-16"]
    assert first["runs"][1]["l0"] == 16.0
    capsys.readouterr()
    script.main([*base, "--steps", "10", "--json", str(tmp_path / "b.json")])  # nothing left to train
    assert "step" not in capsys.readouterr().out.split("|")[0]
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == first
    # the results are lost, the checkpoint is not: the same numbers without a step
    (tmp_path / "runs" / script.RESULTS_FILE).unlink()
    script.main([*base, "--steps", "10", "--json", str(tmp_path / "c.json")])
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8")) == first
    # somewhere else, with what was written before: again nothing to train, also where only some are asked for
    elsewhere = ["--settings", "topk-16", "--out", str(tmp_path / "other"), "--steps", "10"]
    capsys.readouterr()
    script.main([*elsewhere, "--done", str(tmp_path / "a.json"), "--json", str(tmp_path / "d.json")])
    assert "step" not in capsys.readouterr().out.split("|")[0]
    assert json.loads((tmp_path / "d.json").read_text(encoding="utf-8")) == first


def test_an_interrupted_run_ends_where_a_whole_one_does(script, tmp_path, monkeypatch):
    def stop(trainer, *_):
        if trainer.global_step == 7:
            raise KeyboardInterrupt

    settings = {"rho": 0.0, "seed": 0, "steps": 10, "checkpoint_every": 5}
    whole = script.train(["aen-weak", "topk-16"], folder=tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(script.Progress, "on_train_batch_end", lambda self, trainer, *_: stop(trainer))
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            script.train(["aen-weak", "topk-16"], folder=tmp_path / "cut", **settings)
    assert script.train(["aen-weak", "topk-16"], folder=tmp_path / "cut", **settings) == whole


def test_topk_trains_as_in_the_published_trainer(script, tmp_path, monkeypatch):
    """Against torch alone: two linear layers, the k largest, Adam, decoder rows back to norm 1 after each step."""
    seen = []
    monkeypatch.setattr(
        script.Progress, "on_train_batch_start",
        lambda self, trainer, pl_module, batch, *_: seen.append((batch.clone(), weights(pl_module))),
        raising=False,
    )  # fmt: skip

    def weights(pl_module):
        (sae,) = pl_module.saes.values()
        rows = torch.nn.functional.normalize(sae.W_dec.detach(), dim=-1)
        return [p.detach().clone() for p in (sae.W_enc, sae.b_enc, rows, sae.b_dec)]

    script.train(["topk-16"], rho=0.0, seed=0, steps=20, folder=tmp_path, checkpoint_every=100)
    assert len(seen) == 20
    W_enc, b_enc, W_dec, b_dec = (p.double().requires_grad_() for p in seen[0][1])
    for weight, bound in ((W_enc, 1 / 16), (b_enc, 1 / 16)):  # nn.Linear's start for 256 inputs
        assert 0.99 * bound < weight.abs().max() <= bound
    assert not b_dec.any()
    optimizer = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=1e-3)
    for batch, found in seen:
        for ours, theirs in zip(found, (W_enc, b_enc, W_dec, b_dec), strict=True):
            torch.testing.assert_close(ours.double(), theirs.detach(), rtol=0, atol=2e-5)
        x = batch.double()
        kept = ((x - b_dec) @ W_enc + b_enc).topk(16, dim=-1)
        acts = torch.zeros(len(x), 1024, dtype=torch.float64).scatter(-1, kept.indices, kept.values.relu())
        optimizer.zero_grad()
        (acts @ W_dec + b_dec - x).pow(2).sum(dim=-1).mean().backward()
        optimizer.step()
        with torch.no_grad():
            W_dec.copy_(torch.nn.functional.normalize(W_dec, dim=-1))
