from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from aen_lightning.metrics import L0, MSE, DeadFeatures, ExplainedVariance, ShrinkageRatio, matched_cosine


def test_l0_by_hand_and_over_batches():
    metric = L0()
    metric.update(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
    metric.update(torch.tensor([[1e-13, 3.0, 1.0]]))  # 1e-13 is below the paper's threshold
    assert metric.compute().item() == pytest.approx((2 + 0 + 2) / 3)


def test_l0_counts_beyond_what_float32_can():
    metric = L0()
    metric.n_active += 2**24
    metric.n_tokens += 1
    metric.update(torch.tensor([[1.0]]))
    assert metric.n_active.item() == 2**24 + 1


def test_explained_variance_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    x_hat = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    # errors: dimension 0 none, dimension 1 (-1, 1) with variance 1; variances of x: 1 and 4
    metric = ExplainedVariance(2)
    metric.update(x, x_hat)
    assert metric.compute().item() == pytest.approx(1 - 1 / 5)


def test_explained_variance_forgives_a_constant_offset_and_survives_a_large_mean():
    torch.manual_seed(0)
    x = torch.randn(4096, 8, dtype=torch.float64) + 1e4
    x_hat = x + 0.5 * torch.randn(4096, 8, dtype=torch.float64) + 3
    metric = ExplainedVariance(8)
    for part, part_hat in zip(x.split(1000), x_hat.split(1000), strict=True):
        metric.update(part, part_hat)
    expected = 1 - (x - x_hat).var(0).sum() / x.var(0).sum()
    assert metric.compute().item() == pytest.approx(expected.item(), abs=1e-6)


def test_mse_is_a_mean_over_tokens_and_dimensions():
    metric = MSE()
    metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
    metric.update(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    assert metric.compute().item() == (0 + 4 + 1 + 1) / 4


def test_shrinkage_ratio_is_a_ratio_of_sums():
    metric = ShrinkageRatio()
    metric.update(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, -0.5]]))
    metric.update(torch.tensor([[-6.0, 0.0]]), torch.tensor([[-3.0, 1.0]]))
    assert metric.compute().item() == (1 + 4) / (2 + 6)


def test_dead_features_need_silence_over_everything_seen():
    metric = DeadFeatures(4)
    metric.update(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    metric.update(torch.tensor([[0.0, 0.0, 2.0, 0.0]]))
    assert metric.compute().item() == 50.0


def test_matched_cosine_is_one_for_a_permuted_dictionary_and_by_hand_otherwise():
    torch.manual_seed(0)
    true = torch.nn.functional.normalize(torch.randn(6, 32), dim=-1)
    assert matched_cosine(3 * true[torch.randperm(6)], true) == pytest.approx(1.0)
    # the greedy choice (0.8 first) would leave 0; the assignment takes 0.6 + 0.6
    learned = torch.tensor([[0.8, 0.6], [0.6, -0.8]])
    assert matched_cosine(learned, torch.eye(2)) == pytest.approx(max(0.8 - 0.8, 0.6 + 0.6) / 2)


def test_matched_cosine_refuses_different_widths():
    with pytest.raises(ValueError, match=r"same width.*got \(2, 3\) and \(2, 4\)"):
        matched_cosine(torch.ones(2, 3), torch.ones(2, 4))


def test_metrics_accept_leading_context_dimensions():
    x, x_hat = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    flat, shaped = ExplainedVariance(3), ExplainedVariance(3)
    flat.update(x.reshape(10, 3), x_hat.reshape(10, 3))
    shaped.update(x, x_hat)
    assert_close(flat.compute(), shaped.compute())
