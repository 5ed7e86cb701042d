"""Whether coding with a concave penalty was convex for every dictionary."""

from __future__ import annotations

from typing import Any

from sae_lens import SAE
from torch import Tensor

from aen_lightning.saes.penalty import penalty_concavity


def coding_convexity(
    sae: SAE[Any], *, activation_scale: Tensor | None, l1_weights: Tensor | None = None
) -> dict[str, Any] | None:
    """How far the ridge term outweighs a concave penalty: ``2 l2 >= l1 max_j(u_j) / (a tau)``.

    Then the coding problem has one solution, whatever the dictionary. For ``scad`` it is ``a - 1`` in place of ``a``.

    Args:
        sae: The dictionary; its metadata has the penalty and the coefficients, that which ``TargetL0`` reached included.
        activation_scale: tau at the end of training, from ``adaptive_state.safetensors``; None: not known.
        l1_weights: u, shape (d_sae,); None: 1.

    Returns:
        ``penalty``, ``l2_coefficient``, ``l2_needed``, their ``ratio`` (None if nothing is needed; like what follows None
        where tau is not known), ``is_convex``. None for a dictionary without a concave penalty.
    """
    metadata = sae.cfg.metadata
    details = metadata["training_architecture_details"] or {}
    penalty = details.get("penalty", "l1")
    if penalty == "l1" or details.get("hard_k") is not None:  # a hard phase has no penalty
        return None
    l1 = metadata["reached_l1_coefficient"] or details["l1_coefficient"]
    l2 = float(details["l2_coefficient"])
    found: dict[str, Any] = {"penalty": penalty, "l2_coefficient": l2}
    if activation_scale is None:
        return found | dict.fromkeys(("activation_scale", "l2_needed", "ratio", "is_convex"))
    scale = activation_scale.double()
    concavity = penalty_concavity(penalty=penalty, scale=scale, shape=details["penalty_shape"])
    largest = 1.0 if l1_weights is None else float(l1_weights.max())
    needed = float(l1 * largest * concavity / 2)
    return found | {
        "activation_scale": float(scale),
        "l2_needed": needed,
        "ratio": l2 / needed if needed else None,
        "is_convex": l2 >= needed,
    }
