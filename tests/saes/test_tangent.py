from __future__ import annotations

import torch
from torch.testing import assert_close

from aen_lightning.saes.tangent import without_radial_gradient


def test_the_radial_part_of_the_gradient_is_gone_and_nothing_else():
    W = (3 * torch.randn(6, 4, dtype=torch.float64)).requires_grad_()
    target = torch.randn(6, 4, dtype=torch.float64)
    out = without_radial_gradient(W)
    assert torch.equal(out, W)
    (out * target).sum().backward()  # whose gradient is the target
    assert W.grad is not None
    assert_close((W.grad * W).sum(-1), torch.zeros(6, dtype=torch.float64))
    angle = torch.linalg.vecdot(target, W.detach()) / W.detach().square().sum(-1)
    assert_close(W.grad + angle.unsqueeze(1) * W.detach(), target)
