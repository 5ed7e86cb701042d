"""Measures against a known dictionary.

Hand-worked numbers, and agreement with the metric used in training.
"""

from __future__ import annotations

import pytest
import torch

from aen_lightning.metrics import Matching, match_features, matched_cosine
from aen_lightning.metrics.ground_truth import ground_truth_scores, support_scores


def test_matching_finds_a_permutation_and_leaves_the_rest_alone():
    generator = torch.Generator().manual_seed(1)
    true = torch.randn(4, 16, generator=generator)
    learned = torch.cat([2 * true[[2, 0, 3, 1]], torch.randn(2, 16, generator=generator)])
    matching = match_features(learned, true)
    assert matching.first.tolist() == [0, 1, 2, 3]
    assert matching.second.tolist() == [2, 0, 3, 1]
    torch.testing.assert_close(matching.cosine, torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)


def test_support_scores_by_hand():
    matching = Matching(torch.tensor([0, 1, 2]), torch.tensor([1, 0, 2]), torch.ones(3), exact=True)
    true = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    learned = torch.tensor(
        [
            [1.0, 1.0, 0.0, 0.0],  # true 1 and 0: exactly right
            [0.0, 5.0, 1.0, 1.0],  # true 0, true 2 and one without a partner: 1 hit of 3, for 1 true
            [0.0, 0.0, 0.0, 0.0],  # nothing, rightly
            [0.0, 0.0, 0.0, 0.0],  # nothing, wrongly
        ]
    )
    scores = support_scores(learned, true, matching)
    assert scores["precision"] == pytest.approx((1 + 1 / 3 + 1 + 0) / 4)
    assert scores["recall"] == pytest.approx((1 + 1 + 1 + 0) / 4)
    assert scores["f1"] == pytest.approx((1 + 2 / 4 + 1 + 0) / 4)
    assert scores["jaccard"] == pytest.approx((1 + 1 / 3 + 1 + 0) / 4)
    assert scores["exact_support_rate"] == 2 / 4
    assert (scores["l0"], scores["true_l0"]) == (5 / 4, 4 / 4)


def test_scores_of_the_truth_itself_are_perfect_and_matched_cosine_is_that_of_training():
    generator = torch.Generator().manual_seed(2)
    true = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=-1)
    acts = torch.rand(20, 12, generator=generator) * (torch.rand(20, 12, generator=generator) < 0.3)
    order = torch.randperm(12, generator=generator)
    scores = ground_truth_scores(true[order], true, acts[:, order], acts)
    assert scores["matched_cosine"] == pytest.approx(1)
    assert scores["found_at_0.9"] == 1
    assert all(
        scores["support"][k] == 1 for k in ("precision", "recall", "f1", "jaccard", "exact_support_rate")
    )
    other = torch.randn(9, 8, generator=generator)
    scores = ground_truth_scores(other, true, acts[:, :9], acts)
    assert scores["matched_cosine"] == pytest.approx(matched_cosine(other, true))


def test_different_widths_are_refused():
    with pytest.raises(ValueError, match=r"same width.*got \(2, 3\) and \(2, 4\)"):
        match_features(torch.ones(2, 3), torch.ones(2, 4))
