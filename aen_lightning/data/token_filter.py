"""Which tokens' activations count: none of certain ids, and none whose norm is far from the others'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenFilter:
    """Tells which tokens to keep, first by their ids and then, among those left, by the norms of their
    activations.

    Args:
        token_ids: Tokens to leave out.
        norm_outlier_multiple: Leave out a token whose norm exceeds this multiple of the median norm
            (attention sinks exceed it 100 times and more); None: none.

    Raises:
        ValueError: If the multiple is not above 1.
    """

    token_ids: tuple[int, ...] = ()
    norm_outlier_multiple: float | None = None

    def __post_init__(self) -> None:
        if self.norm_outlier_multiple is not None and not self.norm_outlier_multiple > 1:
            raise ValueError(
                f"norm_outlier_multiple must be above 1 or None, got {self.norm_outlier_multiple}"
            )

    def by_id(self, tokens: Tensor) -> Tensor:
        """Which tokens to keep, of the shape of ``tokens``, bool."""
        return ~torch.isin(tokens, torch.tensor(self.token_ids, dtype=torch.long, device=tokens.device))

    def by_norm(self, activations: Sequence[Tensor]) -> Tensor | None:
        """Which tokens to keep, (n,) bool, or None for all of them.

        Args:
            activations: At each hook point (n, d_in), row by row of the same tokens. A token must be within
                the multiple of the median over these n at every hook point.
        """
        if self.norm_outlier_multiple is None or len(activations[0]) == 0:
            return None
        norms = torch.stack([x.float().norm(dim=-1) for x in activations])
        medians = norms.median(dim=1, keepdim=True).values
        return (norms <= self.norm_outlier_multiple * medians).all(dim=0)
