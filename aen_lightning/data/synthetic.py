"""Spiked synthetic activations with a known dictionary (arXiv:2605.05341; its section on synthetic data)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from sae_lens.synthetic import FeatureDictionary
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from aen_lightning.saes.input_scaling import InputScaling, ScalingKind

_VALIDATION_STREAM = 2**31
_TEST_STREAM = 2**31 + 1


def spiked_dictionary(d_in: int, n_features: int, *, rho: float, seed: int) -> FeatureDictionary:
    """A SAELens feature dictionary whose directions share a common component.

    Feature j is ``unit(sqrt(1 - rho) u_j + sqrt(rho) v)`` with ``u_j`` and the one ``v`` unit Gaussian
    directions, so that two features have an expected cosine of about ``rho``.

    Args:
        d_in: Width of the activations.
        n_features: Number of features.
        rho: Share of the common direction, in [0, 1).
        seed: Seed of all directions.
    """
    if not 0 <= rho < 1:
        raise ValueError(f"rho must be in [0, 1), got {rho}")
    # one extra row: the shared direction v
    directions = FeatureDictionary(n_features + 1, d_in, initializer=None, seed=seed).feature_vectors.detach()
    spiked = (1 - rho) ** 0.5 * directions[:-1] + rho**0.5 * directions[-1]

    def initializer(dictionary: FeatureDictionary) -> None:
        dictionary.feature_vectors.data = torch.nn.functional.normalize(spiked, dim=-1)

    return FeatureDictionary(n_features, d_in, initializer=initializer).requires_grad_(False)


def spiked_feature_acts(
    batch_size: int, n_features: int, *, k: int, magnitude: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Codes with exactly ``k`` active features each, chosen uniformly without replacement, magnitudes
    uniform.

    Returns:
        Shape (batch_size, n_features), ``>= 0``.
    """
    active = torch.rand(batch_size, n_features, generator=generator).topk(k, dim=-1).indices
    low, high = magnitude
    values = low + (high - low) * torch.rand(batch_size, k, generator=generator)
    return torch.zeros(batch_size, n_features).scatter_(-1, active, values)


class SpikedDataModule(pl.LightningDataModule):
    """An endless, seeded stream of spiked synthetic activations, and fixed validation and test splits.

    Batch i of rank r is a pure function of (seed, r, i): a resumed run goes on exactly where it stopped, and
    nothing needs saving.

    Args:
        d_in: Width of the activations.
        n_features: Number of true features; the paper has as many as the SAE (1024 at ``d_in`` 256).
        k: Active features per sample.
        rho: Share of the common direction in every feature, in [0, 1).
        magnitude_min: Smallest magnitude of an active feature.
        magnitude_max: Largest magnitude of an active feature.
        noise_std: Standard deviation of Gaussian noise added to each coordinate.
        train_batch_size_tokens: Samples per training batch and rank.
        n_eval_samples: Samples in the validation split, and as many in the test split (per rank).
        seed: Seed of the dictionary and of every sample.
        input_scaling: ``none`` (the paper), or ``per_token``.

    Raises:
        ValueError: For a value out of range.
    """

    def __init__(
        self,
        d_in: int = 256,
        n_features: int = 1024,
        k: int = 16,
        rho: float = 0.3,
        magnitude_min: float = 1.0,
        magnitude_max: float = 3.0,
        noise_std: float = 0.0,
        train_batch_size_tokens: int = 256,
        n_eval_samples: int = 8192,
        seed: int = 0,
        input_scaling: ScalingKind = "none",
    ) -> None:
        super().__init__()
        if not 0 < k <= n_features:
            raise ValueError(f"k must be between 1 and n_features={n_features}, got {k}")
        if not 0 <= magnitude_min <= magnitude_max:
            raise ValueError(
                f"magnitudes need 0 <= magnitude_min <= magnitude_max, got {magnitude_min} and "
                f"{magnitude_max}"
            )
        if noise_std < 0:
            raise ValueError(f"noise_std must be >= 0, got {noise_std}")
        if train_batch_size_tokens < 1 or n_eval_samples < 1:
            raise ValueError(
                "train_batch_size_tokens and n_eval_samples must be positive, "
                f"got {train_batch_size_tokens} and {n_eval_samples}"
            )
        if input_scaling == "average":
            raise ValueError("SpikedDataModule scales 'none' or 'per_token', got 'average'")
        self.save_hyperparameters()
        self.d_in = d_in
        self.input_scaling = InputScaling(input_scaling)
        self.dictionary = spiked_dictionary(d_in, n_features, rho=rho, seed=seed)

    @property
    def feature_vectors(self) -> Tensor:
        """The true dictionary, shape (n_features, d_in), rows of unit norm."""
        return self.dictionary.feature_vectors.detach()

    @property
    def parameters(self) -> dict[str, Any]:
        """The constructor's arguments; LightningCLI adds keys of its own to the hyperparameters."""
        return {key: value for key, value in self.hparams.items() if not key.startswith("_")}

    @property
    def sae_metadata(self) -> dict[str, Any]:
        """What an exported dictionary should say of its data (SAELens metadata)."""
        return {"dataset_path": "synthetic/spiked", "synthetic_data": self.parameters}

    def sample(self, n_samples: int, *, stream: int, index: int) -> tuple[Tensor, Tensor]:
        """Sample ``index`` of a stream: activations (n_samples, d_in), scaled, and the true codes (n_samples,
        n_features)."""
        h = self.hparams
        generator = torch.Generator().manual_seed(_mix(h["seed"], stream, index))
        feature_acts = spiked_feature_acts(
            n_samples,
            h["n_features"],
            k=h["k"],
            magnitude=(h["magnitude_min"], h["magnitude_max"]),
            generator=generator,
        )
        x = self.dictionary(feature_acts)
        if h["noise_std"] > 0:
            x = x + h["noise_std"] * torch.randn(x.shape, generator=generator)
        return self.input_scaling(x), feature_acts

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Endless batches of this rank, from the Trainer's present step on."""
        rank, start = 0, 0
        if self.trainer is not None:
            rank = self.trainer.global_rank
            start = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return DataLoader(_Stream(self, stream=rank, start=start), batch_size=None)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The validation split, the same every time."""
        return self._eval_dataloader(_VALIDATION_STREAM)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """The test split, the same every time."""
        return self._eval_dataloader(_TEST_STREAM)

    def _eval_dataloader(self, stream: int) -> DataLoader[Tensor]:
        rank = self.trainer.global_rank if self.trainer is not None else 0
        x, _ = self.sample(self.hparams["n_eval_samples"], stream=stream, index=rank)
        # batches as views: no collation
        return DataLoader(x.split(self.hparams["train_batch_size_tokens"]), batch_size=None)


class _Stream(IterableDataset[Tensor]):
    def __init__(self, data: SpikedDataModule, *, stream: int, start: int) -> None:
        self.data, self.stream, self.start = data, stream, start

    def __iter__(self) -> Iterator[Tensor]:
        index = self.start
        while True:
            yield self.data.sample(
                self.data.hparams["train_batch_size_tokens"], stream=self.stream, index=index
            )[0]
            index += 1


def _mix(*numbers: int) -> int:
    """One well-spread 63-bit seed from several small integers (splitmix64's finaliser, applied in turn)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
