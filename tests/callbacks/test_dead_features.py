from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aen_lightning.callbacks import DeadFeatureTracker, DelayedWarmup, EMAWeightRefresh


class Module:
    """Stands where a LightningModule would: only its log is looked at."""

    def __init__(self) -> None:
        self.logged: dict[str, Any] = {}

    def log_dict(self, values: dict[str, Any]) -> None:
        self.logged = {k: float(v) for k, v in values.items()}


def feed(tracker: DeadFeatureTracker, module: Module, firings: list[list[int]], first_step: int = 1) -> None:
    for step, counts in enumerate(firings, start=first_step):
        outputs = {"n_firings": {"": torch.tensor(counts)}, "n_tokens": 10}
        tracker.on_train_batch_end(SimpleNamespace(global_step=step), module, outputs, None, step - 1)  # type: ignore[arg-type]


def test_windows_recovery_and_density_by_hand():
    tracker, module = DeadFeatureTracker(window_steps=2), Module()
    feed(tracker, module, [[1, 0, 0, 0], [3, 2, 0, 0]])
    # after the first window features 2 and 3 are dead; rates 4/20, 2/20, 0, 0
    assert module.logged["sparsity/dead_features_window_pct"] == 50.0
    assert "sparsity/recovery_rate" not in module.logged
    assert module.logged["sparsity/below_1e-5"] == 2
    density = tracker.density()
    assert density is not None
    assert density.tolist() == pytest.approx([0.2, 0.1, 0, 0])
    feed(tracker, module, [[0, 1, 1, 0], [0, 0, 0, 0]], first_step=3)
    # features 0 and 3 are dead now; of the previous dead (2, 3) one came back
    assert module.logged["sparsity/dead_features_window_pct"] == 50.0
    assert module.logged["sparsity/recovery_rate"] == 0.5


def test_state_survives_a_checkpoint_in_mid_window():
    whole, first, second = (DeadFeatureTracker(window_steps=3) for _ in range(3))
    steps = [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 2], [0, 0, 0], [1, 0, 0]]
    module, resumed = Module(), Module()
    feed(whole, module, steps)
    feed(first, Module(), steps[:4])
    second.load_state_dict(first.state_dict())
    feed(second, resumed, steps[4:], first_step=5)
    assert resumed.logged == module.logged
    assert resumed.logged["sparsity/recovery_rate"] == 1.0


def test_several_batches_of_one_optimizer_step_count_once():
    tracker, module = DeadFeatureTracker(window_steps=2), Module()
    outputs = {"n_firings": {"": torch.tensor([1, 0])}, "n_tokens": 10}
    for batch_idx, step in enumerate([0, 1, 1, 2]):  # gradient accumulation over two batches
        tracker.on_train_batch_end(SimpleNamespace(global_step=step), module, outputs, None, batch_idx)  # type: ignore[arg-type]
    assert module.logged["sparsity/dead_features_window_pct"] == 50.0
    assert tracker.state_dict()["windows"][""]["last_density"].tolist() == pytest.approx([0.1, 0.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DeadFeatureTracker(window_steps=0),
            "window_steps must be an integer number of steps >= 1, or a share .* got 0",
        ),
        (lambda: EMAWeightRefresh(every_n_steps=0), "every_n_steps must be >= 1, got 0"),
        (
            lambda: DelayedWarmup(ramp_steps=-1),
            "ramp_steps must be an integer number of steps >= 0, or .* got -1",
        ),
    ],
)
def test_bad_arguments_are_named(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
