"""A whole fit by the Triton kernels, under their interpreter, as it would be on a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton", reason="the Triton kernels need triton, which is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1", allow_module_level=True)

from aen_lightning.callbacks import HardFinish
from aen_lightning.sparse import DensitySwitch, RowAdam
from aen_lightning.sparse.low_copies import low_copy
from aen_lightning.training.module import SAEModule
from tests.support.streams import loader
from tests.support.training import SAE_FIELDS, make_trainer
from tests.support.waits import WaitsBetween

N_STEPS = 10
STATE = ("exp_avg", "exp_avg_sq", "silent_steps")


@pytest.fixture
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aen_lightning.sparse.backend.triton_serves", lambda device: True)


@pytest.mark.usefixtures("kernels_everywhere")
def test_the_optimizers_kernel_against_its_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for kernels in (True, False):
        monkeypatch.setattr("aen_lightning.sparse.backend.triton_serves", lambda device, k=kernels: k)
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(7, 5, generator=generator))
        b = torch.nn.Parameter(torch.zeros(6))
        optimizer = RowAdam(
            [p, b], lr=1e-2, betas=(0.5, 0.9), low_dtype=torch.bfloat16
        )  # at rest after 39 steps
        optimizer.hold_rows(p, lambda: torch.linspace(1, 2, 7))
        optimizer.param_groups[0]["max_norm"] = 1.5
        for step in range(60):
            p.grad = torch.randn(7, 5, generator=generator)
            p.grad[0] = 0
            if step % 50:
                p.grad[1:4] = 0
            b.grad = torch.randn(6, generator=generator)
            optimizer.step()
        state = optimizer.state_dict()["state"]
        runs.append([p, b, low_copy(p, torch.bfloat16), *(state[i][n] for i in (0, 1) for n in STATE)])
    for actual, expected in zip(*runs, strict=True):
        # the interpreter cuts off where a GPU rounds to bfloat16
        rtol = 2.0**-7 if expected.dtype == torch.bfloat16 else 1e-5
        assert_close(actual, expected, rtol=rtol, atol=1e-6)
    assert_close(runs[0][0].norm(dim=1), torch.linspace(1, 2, 7))
    assert runs[0][-1].dtype == runs[0][5].dtype == torch.int32


def fit(path: Path, *callbacks: Any, switch: DensitySwitch | None = None, **sae: Any) -> SAEModule:
    torch.manual_seed(0)
    module = SAEModule({**SAE_FIELDS, "d_sae": 20, **sae}, lr=1e-2)
    if switch is not None:
        module.sae.density_switch = switch
    make_trainer(path, N_STEPS, log_every_n_steps=N_STEPS, callbacks=list(callbacks)).fit(module, loader(6))
    return module


def same(a: SAEModule, b: SAEModule) -> None:
    for name, value in a.sae.state_dict().items():
        assert_close(value, b.sae.state_dict()[name], rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("kernels_everywhere")
@pytest.mark.parametrize("capacity", [2**12, 1])
def test_it_ends_where_the_dense_one_ends_and_no_step_waits(
    tmp_path: Path, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # with room for one activation every step overflows, and is taken densely
    monkeypatch.setattr(DensitySwitch, "capacity", capacity)
    counting = WaitsBetween(4, N_STEPS - 1)
    switch = DensitySwitch(threshold=0.9)
    optimizers: list[Any] = []
    monkeypatch.setattr(SAEModule, "on_train_start", lambda self: optimizers.extend(self.trainer.optimizers))
    by_kernels = fit(tmp_path, counting, switch=switch, starvation_guard=0.5)
    assert switch.sparse
    assert isinstance(optimizers[0], RowAdam)
    assert optimizers[0].holds_rows(by_kernels.sae.W_dec)
    assert counting.counted.waits == {}
    monkeypatch.setattr("aen_lightning.sparse.backend.triton_serves", lambda device: False)
    same(by_kernels, fit(tmp_path, sparse_step="off", starvation_guard=0.5))
    assert not isinstance(optimizers[1], RowAdam)


def test_so_does_one_that_turns_hard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aux = {"aux_loss_coefficient": 0.1, "aux_loss_window": 1}
    dense = fit(tmp_path, HardFinish(k=3, at=0.3), sparse_step="off", **aux)
    monkeypatch.setattr("aen_lightning.sparse.backend.triton_serves", lambda device: True)
    counting = WaitsBetween(5, N_STEPS - 1)
    same(fit(tmp_path, HardFinish(k=3, at=0.3), counting, **aux), dense)
    assert counting.counted.waits == {}
