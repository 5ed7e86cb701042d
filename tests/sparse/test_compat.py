"""The inside of ``torch.optim.Adam`` that the sparse step's optimizer reaches into."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from aen_lightning import compat


def test_adam_gathers_its_tensors_as_on_adam_tensors_expects() -> None:
    assert compat.adam_tensors_known(), (
        f"torch {torch.__version__} gathers Adam's tensors differently: "
        f"{inspect.signature(torch.optim.Adam._init_group)}"
    )


def test_a_step_of_adam_uses_the_tensors_that_change_put_there() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    other = torch.zeros(2)
    optimizer = torch.optim.Adam([param], lr=0.1, fused=True)

    def change(group: dict[str, Any], lists: tuple[list[Any], ...]) -> None:
        assert group is optimizer.param_groups[0]
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs = lists
        assert params[0] is param
        assert grads[0] is param.grad
        assert exp_avgs[0] is optimizer.state[param]["exp_avg"]
        assert exp_avg_sqs[0] is optimizer.state[param]["exp_avg_sq"]
        assert not max_exp_avg_sqs
        params[0] = other

    compat.on_adam_tensors(optimizer, change)
    optimizer.step()
    assert param.tolist() == [1.0, 1.0]
    assert torch.allclose(
        other, torch.tensor([-0.1, -0.1])
    )  # Adam's first step is lr long, against the gradient
