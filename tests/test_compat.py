"""Each seam of ``aen_lightning.compat``, on the library as it is installed."""

from __future__ import annotations

import torch
from torch import nn

from aen_lightning.compat import FullPrecisionBuffers


class Statistics(FullPrecisionBuffers, nn.Module):
    full_precision_buffers = ("mean", "unused")

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.tensor([1.0001]))
        self.register_buffer("other", torch.tensor([1.0001]))
        self.register_buffer("unused", None)


def test_every_cast_and_move_of_torch_goes_through_apply():
    for cast in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: nn.Sequential(m).half()[0],
    ):
        module = cast(Statistics())
        assert module.weight.dtype == module.other.dtype != torch.float32
        assert module.mean.dtype == torch.float32
        assert torch.equal(module.mean, torch.tensor([1.0001]))
    assert Statistics().double().mean.dtype == torch.float64
    assert Statistics().to("meta").to(torch.bfloat16).mean.dtype == torch.float32
