"""One pass of a dictionary over held-out activations.

Sparsity, reconstruction in both spaces, use of features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor
from torchmetrics import Metric

from aen_lightning.evaluate.dictionary import run_dictionary, tokens_per_chunk
from aen_lightning.evaluate.inputs import Inputs
from aen_lightning.metrics import (
    Estimate,
    FeatureUse,
    density_histogram,
    finite,
    jackknife_metric,
    reconstruction_metrics,
    sparsity_metrics,
    utilisation,
)


@dataclass
class Reconstruction:
    """What a pass over the inputs gives.

    Args:
        n_tokens: Tokens counted.
        sparsity: ``l0``, ``l1``.
        spaces: ``raw`` and ``scaled``, each a metric by name.
        density: Firings per token, shape (d_sae,).
        mean_when_active: Mean activation where active, in the units the dictionary encodes to, shape
            (d_sae,).
        mean_activation: Mean raw input, shape (d_in,).
    """

    n_tokens: int
    sparsity: dict[str, Estimate]
    spaces: dict[str, dict[str, Estimate]]
    density: Tensor
    mean_when_active: Tensor
    mean_activation: Tensor

    def features(self, *, per_feature: bool = False) -> dict[str, Any]:
        """The section ``features`` of the JSON."""
        dead = self.density == 0
        found: dict[str, Any] = {
            "n_tokens": self.n_tokens,
            "dead_pct": 100 * float(dead.double().mean()),
            "n_dead": int(dead.sum()),
            "mean_density": float(self.density.mean()),
            **{name: finite(value) for name, value in utilisation(self.density).items()},
            "density_histogram": density_histogram(self.density),
        }
        if per_feature:
            found["density"] = self.density.tolist()
            found["mean_when_active"] = self.mean_when_active.tolist()
        return found


@torch.no_grad()
def evaluate_reconstruction(sae: SAE[Any], inputs: Inputs, *, n_groups: int = 32) -> Reconstruction:
    """Run a dictionary over all tokens of ``inputs``.

    Args:
        sae: From :func:`aen_lightning.evaluate.dictionary.load_dictionary`.
        inputs: Raw activations.
        n_groups: Groups of units (context rows) for the standard errors; fewer if there are fewer units.

    Raises:
        ValueError: If every token is left out.
    """
    d_in = sae.cfg.d_in
    n_groups = max(1, min(n_groups, inputs.n_units))
    tables: list[dict[str, dict[str, Metric]]] = [
        {
            "sparsity": _on(sae, sparsity_metrics()),
            "raw": _on(sae, reconstruction_metrics(d_in)),
            "scaled": _on(sae, reconstruction_metrics(d_in)),
        }
        for _ in range(n_groups)
    ]
    use = FeatureUse(sae.cfg.d_sae).to(sae.device)
    x_sum = torch.zeros(d_in, dtype=torch.float64, device=sae.device)
    for batch in inputs.counted("encoding and decoding"):
        units = max(1, tokens_per_chunk(sae) // batch.x.shape[1])
        for start in range(0, len(batch.x), units):
            part = slice(start, start + units)
            x, keep = batch.x[part].to(sae.device), batch.keep[part].to(sae.device)
            feature_acts, x_hat = run_dictionary(sae, x)
            unit = batch.first_unit + start + torch.arange(len(x), device=sae.device)
            group = (unit * n_groups // inputs.n_units).clamp_max(n_groups - 1)
            for g in group.unique().tolist():
                mine = keep & (group == g).unsqueeze(1)
                if mine.any():
                    _update(tables[g], x[mine], x_hat[mine], feature_acts[mine])
            use.update(feature_acts[keep])
            x_sum += x[keep].double().sum(dim=0)
    n_tokens = int(use.n_tokens)
    if n_tokens == 0:
        raise ValueError(
            "no token is left to evaluate on: every one is special or an outlier; give other data"
        )
    found = use.compute()
    return Reconstruction(
        n_tokens=n_tokens,
        sparsity=_gather(tables, "sparsity"),
        spaces={space: _gather(tables, space) for space in ("raw", "scaled")},
        density=found["density"].cpu(),
        mean_when_active=found["mean_when_active"].cpu(),
        mean_activation=(x_sum / n_tokens).float(),
    )


def _on(sae: SAE[Any], metrics: dict[str, Metric]) -> dict[str, Metric]:
    return {name: metric.to(sae.device) for name, metric in metrics.items()}


def _update(table: dict[str, dict[str, Metric]], x: Tensor, x_hat: Tensor, feature_acts: Tensor) -> None:
    for metric in table["sparsity"].values():
        metric.update(feature_acts.abs())  # a signed code is as active below zero as above
    # the paper's space: every token at norm sqrt(d_in), its reconstruction scaled with it
    factor = math.sqrt(x.shape[-1]) / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    for space, inputs, outputs in (("raw", x, x_hat), ("scaled", x * factor, x_hat * factor)):
        for metric in table[space].values():
            metric.update(inputs, outputs)


def _gather(tables: list[dict[str, dict[str, Metric]]], section: str) -> dict[str, Estimate]:
    return {name: jackknife_metric([table[section][name] for table in tables]) for name in tables[0][section]}
