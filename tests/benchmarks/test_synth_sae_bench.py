from __future__ import annotations

import json

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig


@pytest.fixture
def script(load_script):
    return load_script("synth_sae_bench")


@pytest.fixture
def tiny(script, monkeypatch):
    size = script.Size(64, 16, 32, 2, 5e-2, 2, 12, 32, 256, 4, (1e-3, 3e-3), (3e-3,), (0, 1))
    monkeypatch.setitem(script.SIZES, "quick", size)
    return size


def test_every_variant_sees_the_same_samples_kept_or_not(script, tiny):
    model = script.synthetic_model(tiny)
    batches = []
    for keep in (True, False):
        samples = script.Samples(model, batch_size=8, seed=3, keep=keep)
        for _ in range(2):
            batches.append(torch.stack([batch for batch, _ in zip(samples, range(3), strict=False)]))
    assert all(torch.equal(batches[0], other) for other in batches[1:])
    assert not torch.equal(batches[0][0], batches[0][1])


def test_calibration_gives_the_asked_l0_and_keeps_the_thresholds_ratios(script):
    torch.manual_seed(0)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=40)).requires_grad_(False)
    sae.W_enc.data.normal_()
    sae.threshold.data = torch.rand(40) + 0.5
    before, x = sae.threshold.clone(), torch.randn(1000, 8)
    script.calibrate(sae, x, 5.0)
    assert float((sae.encode(x) > 0).sum(dim=-1).float().mean()) == pytest.approx(5.0, abs=2e-3)
    torch.testing.assert_close(sae.threshold / before, torch.full((40,), float(sae.threshold[0] / before[0])))


def test_the_best_learning_rate_is_chosen_on_the_first_seed_alone(script):
    rows = [
        {"variant": "l1", "lr": 1e-3, "seed": 0, "ev": 0.5},
        {"variant": "l1", "lr": 3e-3, "seed": 0, "ev": 0.6},
        {"variant": "l1", "lr": 1e-3, "seed": 1, "ev": 0.9},
    ]
    assert script.best_lrs(rows, first_seed=0) == {"l1": 3e-3}


def test_summary_has_means_and_spreads_at_the_best_learning_rate(script):
    same = dict.fromkeys(script.METRICS, 1.0)
    rows = [
        {"variant": "l1", "lr": 1e-3, "seed": seed, **same, "ev": ev} for seed, ev in enumerate((0.4, 0.6))
    ]
    rows.append({"variant": "l1", "lr": 1.0, "seed": 0, **same, "ev": 0.0})
    means = script.summarise(rows, {"l1": 1e-3})["l1"]
    assert means["ev"] == pytest.approx(0.5)
    assert means["ev_std"] == pytest.approx(0.02**0.5)  # both are 0.1 off: sqrt(2 * 0.01 / 1)
    assert means["seeds"] == 2


def test_order_is_judged_metric_by_metric(script):
    means = {
        "l1": {"ev": 0.7, "f1": 0.5, "mcc": 0.6},
        "batchtopk": {"ev": 0.8, "f1": 0.4, "mcc": 0.7},
        "jumprelu": {"ev": 0.8, "f1": 0.6, "mcc": 0.7},
    }
    assert script.published_order(means) == {"ev": True, "f1": False, "mcc": True}
    assert all(script.published_order(script.PUBLISHED).values())


def test_only_recommended_has_a_hard_finish(script, tiny):
    hard = {
        variant
        for variant in script.VARIANTS
        if any(type(c).__name__ == "HardFinish" for c in script.make_run(variant, tiny, lr=1e-3, seed=0)[1])
    }
    assert hard == {"recommended"}


def test_it_runs_resumes_and_writes(script, tiny, tmp_path, capsys):
    arguments = [
        "--quick",
        "--l0",
        "4",
        "6",
        "--out",
        str(tmp_path / "runs"),
        "--json",
        str(tmp_path / "out.json"),
    ]
    script.main(arguments)
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert set(written["means"]) == set(written["published_order"]) == {"4", "6"}
    # two rates on the first seed, the better one on the second; JumpReLU has one rate here
    assert len(written["runs"]) == 2 * (6 * 3 + 2)
    for l0, means in written["means"].items():
        assert set(means) == set(script.VARIANTS)
        assert all(mean["seeds"] == 2 for mean in means.values())
        # the runs of one L0 are not mixed with those of the other
        assert means["recommended"]["l0"] == pytest.approx(float(l0), rel=0.2)
        assert means["recommended"]["ev"] == pytest.approx(
            _mean(written["runs"], "recommended", l0, means), rel=1e-9
        )
    capsys.readouterr()
    script.main(arguments)  # everything is done
    assert "'variant'" not in capsys.readouterr().out


def _mean(runs, variant, l0, means):
    mine = [
        run["ev"]
        for run in runs
        if run["variant"] == variant and run["target_l0"] == float(l0) and run["lr"] == means[variant]["lr"]
    ]
    return sum(mine) / len(mine)
