"""A language model whose work is split over ranks that all need all of its activations."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from aen_lightning.language_model.cut_model import ActivationModel


class SplitRows:
    """Runs the model on this rank's share of the rows and gathers the others' activations.

    Every rank must call it with the same tokens. Activations are gathered in the model's own dtype, and are
    bit for bit the same on all ranks.

    Args:
        model: The same model on every rank, whole.
        group: The ranks.
    """

    def __init__(self, model: ActivationModel, group: dist.ProcessGroup) -> None:
        self.model, self.group = model, group
        self.hooks = model.hooks

    @property
    def device(self) -> torch.device:
        """Where ``input_ids`` belong."""
        return self.model.device

    @torch.no_grad()
    def activations(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """See ``CutModel.activations``."""
        n_ranks, n_rows = dist.get_world_size(self.group), len(input_ids)
        share = -(-n_rows // n_ranks)
        # ranks beyond the last row run it again, so that all make the same calls
        rows = torch.arange(share) + share * dist.get_rank(self.group)
        rows = rows.clamp_max(n_rows - 1)

        def mine(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows.to(tensor.device)]

        own = self.model.activations(
            input_ids[rows.to(input_ids.device)],
            attention_mask=mine(attention_mask),
            position_ids=mine(position_ids),
        )
        return {name: self._gather(part)[:n_rows] for name, part in own.items()}

    def _gather(self, part: Tensor) -> Tensor:
        whole = part.new_empty(dist.get_world_size(self.group), *part.shape)
        dist.all_gather(list(whole.unbind()), part.contiguous(), group=self.group)
        return whole.flatten(0, 1)
