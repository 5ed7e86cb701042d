"""The shuffle buffer is SAELens's."""

from __future__ import annotations

import pytest
import torch
from sae_lens.training.mixing_buffer import mixing_buffer

from aen_lightning.data.mixing import MixingBuffer


@pytest.mark.parametrize(
    ("buffer_size", "batch_size", "mix"), [(64, 16, 0.5), (50, 16, 0.9), (40, 40, 0.0), (33, 7, 1.0)]
)
def test_mixing_buffer_is_saelens_mixing_buffer(buffer_size: int, batch_size: int, mix: float):
    rows = torch.arange(2000.0).view(-1, 2)
    chunks = rows.split([13, 29, 1, 57, 100, *[40] * 20])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        theirs = list(mixing_buffer(buffer_size, batch_size, iter(chunks), mix))
    buffer = MixingBuffer(buffer_size, batch_size, mix, torch.Generator().manual_seed(5))
    ours = [batch for chunk in chunks for batch in buffer.push(chunk)]
    assert len(ours) > 10
    assert all(
        torch.equal(a, b) for a, b in zip(ours, theirs, strict=False)
    )  # theirs also serves the rest at the end
