"""Metrics and their standard errors, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from aen_lightning.metrics import (
    L1,
    MSE,
    R2,
    Cosine,
    ExplainedVariance,
    FeatureUse,
    L2Ratio,
    RelativeReconstructionBias,
    SquaredError,
    density_histogram,
    jackknife,
    jackknife_metric,
    utilisation,
)


def test_metrics_by_hand():
    x, x_hat = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    expected = {
        Cosine(): (3 / 5 + 1) / 2,
        L2Ratio(): (3 / 5 + 1 / 2) / 2,
        SquaredError(): (16 + 1) / 2,
        RelativeReconstructionBias(): (9 + 1) / (9 + 2),
        # variances of x: (1.5^2 + 1^2) summed over dimensions; squared error 8.5
        R2(2): 1 - 8.5 / (2.25 + 1),
    }
    for metric, value in expected.items():
        metric.update(x[:1], x_hat[:1])
        metric.update(x[1:], x_hat[1:])
        assert metric.compute().item() == pytest.approx(value), type(metric).__name__
    l1 = L1()
    l1.update(torch.tensor([[1.0, 0.0, 2.0], [0.0, -3.0, 0.0]]))
    assert l1.compute().item() == 3


def test_feature_use_counts_firings_and_strength():
    use = FeatureUse(3)
    use.update(torch.tensor([[1.0, 0.0, 0.0], [3.0, 1e-13, 0.0]]))
    use.update(torch.tensor([[[0.0, 0.0, -4.0]]]))
    found = use.compute()
    assert_close(found["density"], torch.tensor([2 / 3, 0, 1 / 3], dtype=torch.float64))
    assert_close(found["mean_when_active"][[0, 2]], torch.tensor([2.0, 4.0], dtype=torch.float64))


def test_utilisation_by_hand():
    even = utilisation(torch.full((200,), 0.3))
    assert even["gini"] == pytest.approx(0, abs=1e-12)
    assert even["normalized_entropy"] == pytest.approx(1)
    assert (even["top_1pct_mass"], even["top_10pct_mass"]) == (pytest.approx(0.01), pytest.approx(0.1))
    one = torch.zeros(200)
    one[7] = 0.5
    alone = utilisation(one)
    assert alone["gini"] == pytest.approx(1 - 1 / 200)
    assert alone["normalized_entropy"] == pytest.approx(0, abs=1e-12)
    assert alone["top_1pct_mass"] == 1
    # rates 1 and 3: mean absolute difference 1 over all ordered pairs, over twice the mean of 2; entropy of
    # (1/4, 3/4) over log 2
    two = utilisation(torch.tensor([3.0, 1.0]))
    assert two["gini"] == pytest.approx(0.25)
    assert two["normalized_entropy"] == pytest.approx(-(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)))
    assert all(math.isnan(v) for v in utilisation(torch.zeros(4)).values())


def test_density_histogram_puts_every_feature_somewhere():
    found = density_histogram(torch.tensor([0.0, 1.0, 0.011, 0.0099, 1e-9]))
    assert found["n_never"] == 1
    assert sum(found["counts"]) == 4
    assert (found["counts"][0], found["counts"][-1]) == (1, 1)
    edges = found["log10_edges"]
    assert (edges[0], edges[-1], len(edges)) == (-7, 0, len(found["counts"]) + 1)
    assert found["counts"][edges.index(-2)] == 1
    assert found["counts"][edges.index(-2) - 1] == 1


def test_jackknife_of_a_mean_is_the_textbook_standard_error():
    values = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums = torch.stack([values, torch.ones(50, dtype=torch.float64)], dim=1)
    mean, se = jackknife(sums, lambda s: s[0] / s[1])
    assert_close(mean, values.mean())
    assert_close(se, values.std() / 50**0.5)
    assert jackknife(sums[:1], lambda s: s[0])[1].isnan()


def test_jackknife_of_metrics_pools_groups_and_estimates_their_spread():
    torch.manual_seed(0)
    groups, x, x_hat = [], torch.randn(40, 8, 3), torch.randn(40, 8, 3)
    for a, b in zip(x, x_hat, strict=True):
        metric = MSE()
        metric.update(a, b)
        groups.append(metric)
    found = jackknife_metric(groups)
    assert found["value"] == pytest.approx((x - x_hat).square().mean().item(), rel=1e-6)
    per_group = (x - x_hat).square().mean(dim=(1, 2))
    assert found["se"] == pytest.approx((per_group.std() / 40**0.5).item(), rel=1e-3)
    variance = ExplainedVariance(3)
    variance.update(x[0], x_hat[0])
    assert jackknife_metric([variance])["se"] is None
    assert jackknife_metric([MSE(), groups[0]])["value"] == pytest.approx(groups[0].compute().item())
