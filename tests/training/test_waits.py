"""Between logging steps nothing in a fit waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader

from aen_lightning.callbacks import HardFinish, TargetL0
from aen_lightning.training.module import SAEModule, SweepModule
from tests.support.streams import batch_at, loader
from tests.support.training import SAE_FIELDS, make_trainer
from tests.support.waits import WaitsBetween


def fit(path: Path, module: pl.LightningModule, *callbacks: pl.Callback, **kwargs: Any) -> WaitsBetween:
    counting = WaitsBetween(12, 38)
    make_trainer(path, 40, log_every_n_steps=40, callbacks=[counting, *callbacks], **kwargs).fit(
        module, loader()
    )
    return counting


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_no_step_of_a_dense_run_waits(tmp_path: Path, precision: str, bar: type[pl.Callback]) -> None:
    module = SAEModule(SAE_FIELDS)
    counting = fit(tmp_path, module, bar(), precision=precision, enable_progress_bar=True)
    assert not module.sae.density_switch.sparse
    assert counting.counted.operations["_fused_adam_"] == 26
    assert counting.counted.waits == {}


def test_nor_of_saelens_architectures_and_sweeps(tmp_path: Path) -> None:
    standard = {"architecture": "standard", "d_in": 16, "d_sae": 48, "l1_coefficient": 0.1}
    module = SweepModule([standard, SAE_FIELDS], lr=1e-3)
    assert fit(tmp_path, module, precision="bf16-mixed").counted.waits == {}


def test_nor_of_a_run_with_a_target_l0(tmp_path: Path) -> None:
    assert fit(tmp_path, SAEModule(SAE_FIELDS), TargetL0(20.0)).counted.waits == {}


def test_nor_of_a_hard_phase_with_its_auxiliary_loss(tmp_path: Path) -> None:
    # without kernels the hard phase of a GPU is the dense one
    sae = {**SAE_FIELDS, "sparse_step": "off", "aux_loss_coefficient": 1 / 32, "aux_loss_window": 3}
    module = SAEModule(sae)
    counting = fit(tmp_path, module, HardFinish(k=0.2, at=0.2))
    assert module.sae.n_hard_steps == 32
    assert module.tracked[0].revived_neuron_mask.any()
    assert counting.counted.waits == {}


def test_a_dense_step_is_six_tenths_of_the_operations_that_it_was(tmp_path: Path) -> None:
    # it was 121 in bf16-mixed when each gradient was clipped by itself and Adam was not fused
    counting = WaitsBetween(12, 38)
    batches = [batch_at(n, batch_size=64, d_in=16) for n in range(40)]  # made here, so as not to be counted
    trainer = make_trainer(tmp_path, 40, log_every_n_steps=40, callbacks=[counting], precision="bf16-mixed")
    trainer.fit(SAEModule(SAE_FIELDS), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert sum(counting.counted.operations.values()) / 26 <= 0.6 * 121


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_bar_shows_the_values_of_the_last_logging_step(tmp_path: Path, bar: Any) -> None:
    shown: list[dict[str, Any]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            shown.append(trainer.progress_bar_callback.get_metrics(trainer, pl_module))
            logged.append(trainer.callback_metrics["loss"].item())

    logged: list[float] = []
    bar = bar()
    module = SAEModule(SAE_FIELDS)
    trainer = make_trainer(
        tmp_path, 20, log_every_n_steps=10, callbacks=[bar, Watch()], enable_progress_bar=True
    )
    trainer.fit(module, loader())
    for metrics, loss in zip(shown, logged, strict=True):
        assert metrics["loss"] == loss  # as Lightning knows it
        assert {"l0", "ev", "dead%"} <= set(metrics)
    assert len({metrics["loss"] for metrics in shown}) == 3  # of steps 1, 10 and 20
    assert "get_metrics" not in vars(bar)  # handed back


def test_gradients_are_clipped_in_bf16_mixed(tmp_path: Path) -> None:
    norms: list[float] = []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            grads = [p.grad for p in pl_module.sae.parameters() if p.grad is not None]
            norms.extend([torch.nn.utils.get_total_norm(grads).item()] if grads else [])

    module = SAEModule(SAE_FIELDS)
    trainer = make_trainer(tmp_path, 5, precision="bf16-mixed", gradient_clip_val=0.5, callbacks=[Watch()])
    trainer.fit(module, loader())
    assert trainer.optimizers[0].defaults["fused"]
    assert norms
    assert norms == pytest.approx([0.5] * len(norms), rel=1e-3)


def test_a_matmul_precision_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="must be one of highest, high, medium or None, got 'tf32'"):
        SAEModule(SAE_FIELDS, float32_matmul_precision="tf32")
