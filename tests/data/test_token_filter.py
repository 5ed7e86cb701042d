"""Which tokens are kept, on numbers worked by hand."""

from __future__ import annotations

import pytest
import torch

from aen_lightning.data.token_filter import TokenFilter


def test_tokens_are_left_out_by_id():
    tokens = torch.tensor([[5, 1], [2, 9]], dtype=torch.int32)
    assert TokenFilter((1, 9)).by_id(tokens).tolist() == [[True, False], [True, False]]
    assert TokenFilter().by_id(tokens).all()


def test_a_norm_counts_against_the_median_of_its_hook_point():
    # norms 5, 1, 2, 3 (median 2: the lower of the two in the middle) and 10, 10, 10, 31
    first = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    second = torch.tensor([[10.0], [10.0], [-10.0], [31.0]])
    assert TokenFilter(norm_outlier_multiple=2.0).by_norm([first]).tolist() == [False, True, True, True]
    assert TokenFilter(norm_outlier_multiple=2.0).by_norm([first, second]).tolist() == [
        False,
        True,
        True,
        False,
    ]
    assert TokenFilter(norm_outlier_multiple=2.5).by_norm([first]).all()  # 2.5 times the median is within it


def test_nothing_to_filter_keeps_all():
    assert TokenFilter().by_norm([torch.ones(3, 2)]) is None
    assert TokenFilter(norm_outlier_multiple=2.0).by_norm([torch.ones(0, 2)]) is None


@pytest.mark.parametrize("multiple", [1.0, 0.5, -3.0, float("nan")])
def test_a_multiple_that_leaves_out_the_median_is_refused(multiple: float):
    with pytest.raises(ValueError, match="norm_outlier_multiple must be above 1 or None, got"):
        TokenFilter(norm_outlier_multiple=multiple)
