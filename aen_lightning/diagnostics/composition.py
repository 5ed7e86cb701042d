"""What happens to features that are active together.

Decode k of them, encode again, and see which survive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from aen_lightning.evaluate.dictionary import run_dictionary
from aen_lightning.metrics import ACTIVE_THRESHOLD

_GEOMETRY = ("interference", "tied_spurious_energy")


@torch.no_grad()
def composition(
    sae: SAE[Any],
    density: Tensor,
    mean_when_active: Tensor,
    *,
    sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    n_samples: int = 128,
    by_frequency: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Compose k features at their usual magnitudes, decode, re-encode, and count what is lost or comes out of
    nowhere.

    Everything happens in the space the dictionary was trained in, so the composed input has the norm its
    parts give it and is not scaled back to that of a token.

    Args:
        sae: The dictionary, inside :func:`aen_lightning.evaluate.dictionary.scaled_space`.
        density: Firing rate per feature, shape (d_sae,); features that never fired are not used.
        mean_when_active: Magnitude to set each feature to, shape (d_sae,).
        sizes: The k; those above the number of live features are left out.
        n_samples: Random sets of features for each k.
        by_frequency: Draw features by how often they fire, as real inputs do; else all live ones alike.
        seed: Of the sets.

    Returns:
        The section ``composition``: ``sizes``, and lists as long, each a mean over samples: ``lost_share`` of
        the k features (not active after), ``spurious`` features (active after, not among the k; a count),
        ``spurious_mass`` (their share of all activation), ``spurious_energy`` (sum of their squares, over
        that of the k composed), ``magnitude_ratio`` (activation of the k after,
        over before, lost ones as 0), ``relative_error`` (``||h' - h|| / ||h||``), ``reconstruction_error``
        (``||x' - x||^2 / ||x - b_dec||^2``, x' decoded again), ``interference`` (``sum_j |sum_i h_i d_i .
        d_j| / sum_j h_j ||d_j||^2`` over j and other i among the k, d rows of the dictionary: how much the
        others add to a feature by overlap, whatever the encoder), ``tied_spurious_energy`` (as
        ``spurious_energy``, of what the decoder itself would read back: ``relu(x . d_j / ||d_j||^2)`` of live
        features, without a bias); ``random_sphere``: ``interference`` and ``tied_spurious_energy`` of as many
        random directions of the same norms, composed of the same features at the same magnitudes: what the
        sizes alone give; and ``half_lost_at``: the smallest k of ``sizes`` at which half of the features are
        lost, None if never.

    Raises:
        ValueError: If no feature ever fired.

    Source: the collapse under composition is described in arXiv:2605.05223.
    """
    live = (density > 0).nonzero().flatten()
    if len(live) == 0:
        raise ValueError("no feature fired on the inputs, so none can be composed")
    sizes = [k for k in sizes if k <= len(live)]
    weights = density[live].double() if by_frequency else torch.ones(len(live), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    W_dec, norms = sae.W_dec.detach().float(), sae.W_dec.detach().float().norm(dim=-1)
    random = torch.randn(W_dec.shape, generator=torch.Generator().manual_seed(seed + 1)).to(W_dec.device)
    random *= (norms / random.norm(dim=-1)).unsqueeze(-1)
    names = (
        "lost_share", "spurious", "spurious_mass", "spurious_energy", "magnitude_ratio", "relative_error",
        "reconstruction_error", *_GEOMETRY,
    )  # fmt: skip
    found: dict[str, Any] = {"n_samples": n_samples, "by_frequency": by_frequency, "sizes": sizes}
    table: dict[str, list[float]] = {name: [] for name in names}
    control: dict[str, list[float]] = {name: [] for name in _GEOMETRY}
    for k in sizes:
        chosen = live[_draw(weights, n_samples, k, generator)].to(W_dec.device)
        magnitudes = mean_when_active.float().to(W_dec.device)[chosen]
        sums, random_sums = dict.fromkeys(names, 0.0), dict.fromkeys(_GEOMETRY, 0.0)
        for index, values in zip(chosen.split(32), magnitudes.split(32), strict=True):
            geometry = _geometry(W_dec, live, index, values)
            for name, value in (_compose(sae, W_dec, index, values) | geometry).items():
                sums[name] += float(value.double().sum())
            for name, value in _geometry(random, live, index, values).items():
                random_sums[name] += float(value.double().sum())
        for name in names:
            table[name].append(sums[name] / n_samples)
        for name in _GEOMETRY:
            control[name].append(random_sums[name] / n_samples)
    lost = [k for k, share in zip(sizes, table["lost_share"], strict=True) if share >= 0.5]
    return found | table | {"random_sphere": control, "half_lost_at": min(lost, default=None)}


def _draw(weights: Tensor, n_samples: int, k: int, generator: torch.Generator) -> Tensor:
    """Sets of k different indices, shape (n_samples, k).

    By the Gumbel trick, which takes any number of categories.
    """
    rows = []
    for _ in range(n_samples):
        noise = -torch.log(-torch.log(torch.rand(len(weights), dtype=torch.float64, generator=generator)))
        rows.append((weights.log() + noise).topk(k).indices)
    return torch.stack(rows)


def _geometry(W_dec: Tensor, live: Tensor, index: Tensor, values: Tensor) -> dict[str, Tensor]:
    """``_GEOMETRY`` of each sample, shape (n_samples,): what the directions do, whatever the encoder."""
    atoms, own = W_dec[index], W_dec.square().sum(dim=-1)
    offset = (values.unsqueeze(-1) * atoms).sum(dim=1)
    # overlap of each chosen atom with the sum of the others
    overlap = (atoms @ offset.unsqueeze(-1)).squeeze(-1) - values * own[index]
    read = (offset @ W_dec.T / own.clamp_min(1e-12)).relu().scatter(1, index, 0.0)
    return {
        "interference": overlap.abs().sum(dim=-1) / (own[index] * values).sum(dim=-1).clamp_min(1e-12),
        "tied_spurious_energy": read[:, live.to(W_dec.device)].square().sum(dim=-1)
        / values.square().sum(dim=-1).clamp_min(1e-12),
    }


def _compose(sae: SAE[Any], W_dec: Tensor, index: Tensor, values: Tensor) -> dict[str, Tensor]:
    h = torch.zeros(len(index), len(W_dec), device=W_dec.device).scatter_(1, index, values)
    atoms = W_dec[index]
    offset = (values.unsqueeze(-1) * atoms).sum(dim=1)
    x = offset + sae.b_dec.detach().float()
    again, x_again = run_dictionary(sae, x)
    kept = again.gather(1, index)
    others = again.scatter(1, index, 0.0)
    total = again.abs().sum(dim=-1)
    return {
        "lost_share": (kept.abs() <= ACTIVE_THRESHOLD).float().mean(dim=-1),
        "spurious": (others.abs() > ACTIVE_THRESHOLD).sum(dim=-1),
        "spurious_mass": others.abs().sum(dim=-1) / total.clamp_min(1e-12),
        "spurious_energy": others.square().sum(dim=-1) / values.square().sum(dim=-1).clamp_min(1e-12),
        "magnitude_ratio": kept.sum(dim=-1) / values.sum(dim=-1).clamp_min(1e-12),
        "relative_error": (again - h).norm(dim=-1) / h.norm(dim=-1),
        "reconstruction_error": (x_again - x).square().sum(dim=-1)
        / offset.square().sum(dim=-1).clamp_min(1e-12),
    }
