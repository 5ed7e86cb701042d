from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from aen_lightning.data.synthetic import SpikedDataModule, spiked_dictionary
from aen_lightning.saes.input_scaling import InputScaling


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9])
def test_dictionary_has_unit_rows_with_the_expected_cosine(rho: float):
    vectors = spiked_dictionary(512, 200, rho=rho, seed=0).feature_vectors
    assert_close(vectors.norm(dim=-1), torch.ones(200))
    cosine = vectors @ vectors.T
    off_diagonal = cosine[~torch.eye(200, dtype=torch.bool)]
    assert off_diagonal.mean().item() == pytest.approx(rho, abs=0.02)


def test_samples_are_the_dictionary_times_codes_with_exactly_k_uniform_magnitudes():
    data = SpikedDataModule(d_in=32, n_features=64, k=5, rho=0.3, seed=3)
    x, codes = data.sample(20_000, stream=0, index=0)
    assert_close(x, codes @ data.feature_vectors)
    assert ((codes > 0).sum(-1) == 5).all()
    values = codes[codes > 0]
    assert 1 <= values.min() < 1.01
    assert 2.99 < values.max() <= 3
    assert values.mean().item() == pytest.approx(2, abs=0.01)
    assert values.std().item() == pytest.approx(2 / 12**0.5, abs=0.01)
    rates = (codes > 0).float().mean(0)  # each feature equally often: 5/64, standard error about 0.0019
    assert (rates - 5 / 64).abs().max() < 0.01


def test_noise_is_added_where_asked():
    quiet, noisy = SpikedDataModule(noise_std=0.0), SpikedDataModule(noise_std=0.25)
    difference = noisy.sample(500, stream=0, index=0)[0] - quiet.sample(500, stream=0, index=0)[0]
    assert difference.std().item() == pytest.approx(0.25, rel=0.02)


def test_a_batch_is_a_pure_function_of_seed_rank_and_index():
    a, b = SpikedDataModule(seed=1), SpikedDataModule(seed=1)
    torch.manual_seed(123)  # the global generator plays no part
    assert torch.equal(a.sample(8, stream=0, index=5)[0], b.sample(8, stream=0, index=5)[0])
    assert not torch.equal(a.sample(8, stream=0, index=5)[0], a.sample(8, stream=1, index=5)[0])
    assert not torch.equal(a.sample(8, stream=0, index=5)[0], a.sample(8, stream=0, index=6)[0])
    assert not torch.equal(a.feature_vectors, SpikedDataModule(seed=2).feature_vectors)


def test_splits_are_fixed_finite_and_apart():
    data = SpikedDataModule(n_eval_samples=1000, train_batch_size_tokens=300)
    val, again, test = (
        torch.cat(list(loader))
        for loader in (data.val_dataloader(), data.val_dataloader(), data.test_dataloader())
    )
    assert val.shape == test.shape == (1000, 256)
    assert torch.equal(val, again)
    stream = iter(data.train_dataloader())
    first = next(stream)
    assert first.shape == (300, 256)
    assert not torch.equal(next(stream), first)
    assert not torch.equal(first, val[:300])
    assert not torch.equal(test, val)


def test_per_token_scaling_gives_norm_sqrt_d_in():
    data = SpikedDataModule(input_scaling="per_token")
    assert_close(data.sample(50, stream=0, index=0)[0].norm(dim=-1), torch.full((50,), 16.0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k must be between 1 and n_features=1024, got 0"),
        ({"rho": 1.0}, r"rho must be in \[0, 1\), got 1.0"),
        ({"magnitude_min": 4.0}, "magnitude_min <= magnitude_max, got 4.0 and 3.0"),
        ({"noise_std": -1.0}, "noise_std must be >= 0, got -1.0"),
        ({"train_batch_size_tokens": 0}, "must be positive, got 0 and"),
        ({"input_scaling": "average"}, "scales 'none' or 'per_token', got 'average'"),
        ({"input_scaling": "unit"}, "must be 'none', 'per_token' or 'average', got 'unit'"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SpikedDataModule(**fields)


def test_scaling_by_hand():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert_close(InputScaling("per_token")(x), torch.tensor([[0.6, 0.8], [0.0, 0.0]]) * 2**0.5)
    assert_close(InputScaling("average", 0.5)(x), x / 2)
    assert InputScaling()(x) is x


@pytest.mark.parametrize("factor", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_average_scaling_needs_a_positive_factor(factor: float | None):
    with pytest.raises(ValueError, match="needs a positive finite factor, got"):
        InputScaling("average", factor)
