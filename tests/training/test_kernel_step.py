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

from aen_lightning.callbacks import HardFinish  # noqa: E402
from aen_lightning.sparse import DensitySwitch  # noqa: E402
from aen_lightning.training.module import SAEModule  # noqa: E402
from tests.support.streams import loader  # noqa: E402
from tests.support.training import SAE_FIELDS, make_trainer  # noqa: E402
from tests.support.waits import WaitsBetween  # noqa: E402

N_STEPS = 16


@pytest.fixture
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aen_lightning.sparse.backend.triton_serves", lambda device: True)


def fit(path: Path, *callbacks: Any, switch: DensitySwitch | None = None, **sae: Any) -> SAEModule:
    torch.manual_seed(0)
    module = SAEModule({**SAE_FIELDS, "d_sae": 24, **sae}, lr=1e-2)
    if switch is not None:
        module.sae.density_switch = switch
    make_trainer(path, N_STEPS, log_every_n_steps=N_STEPS, callbacks=list(callbacks)).fit(module, loader(8))
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
    counting = WaitsBetween(4, N_STEPS - 2)
    switch = DensitySwitch(threshold=0.9)
    by_kernels = fit(tmp_path, counting, switch=switch, starvation_guard=0.5)
    assert switch.sparse
    assert counting.counted.waits == {}
    same(by_kernels, fit(tmp_path, sparse_step="off", starvation_guard=0.5))


def test_so_does_one_that_turns_hard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = fit(tmp_path, HardFinish(k=3, at=0.3), sparse_step="off")
    monkeypatch.setattr("aen_lightning.sparse.backend.triton_serves", lambda device: True)
    counting = WaitsBetween(8, N_STEPS - 2)
    same(fit(tmp_path, HardFinish(k=3, at=0.3), counting), dense)
    assert counting.counted.waits == {}
