from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.testing import assert_close

from aen_lightning import SAEModule
from aen_lightning.callbacks import HardFinish, RefitFinish, ReviveSilent
from aen_lightning.training.module import SweepModule
from tests.support.streams import batch_at, loader
from tests.support.training import make_trainer

FIELDS: dict[str, Any] = {"architecture": "aen", "d_in": 16, "d_sae": 48, "l1_coefficient": 0.02}
SILENT = 12


def module(*, lr: float = 1e-2, lr_decay_steps: int = 0, seed: int = 0, **fields: Any) -> SAEModule:
    """An SAE whose first features are far from firing."""
    made = SAEModule({**FIELDS, **fields}, seed=seed, lr=lr, lr_decay_steps=lr_decay_steps)
    with torch.no_grad():
        for name in ("b_enc", "b_gate", "b_mag"):
            if hasattr(made.sae, name):
                getattr(made.sae, name)[:SILENT] = -6.0
    return made


def fit(trained: Any, path: Path, steps: int, *callbacks: Any, **options: Any) -> Any:
    make_trainer(path, steps, callbacks=list(callbacks), **options).fit(trained, loader())
    return trained


def test_a_bias_rises_by_a_multiple_of_the_learning_rate_a_step_once_its_feature_is_silent(tmp_path: Path):
    trained = fit(module(), tmp_path, 9, ReviveSilent(window=4, rate=3.0))
    # silent for 5, 6, 7, 8 and 9 steps, which is longer than 4; without a gradient nothing else moves them
    assert_close(trained.sae.b_enc[:SILENT], torch.full((SILENT,), -6.0 + 5 * 3.0 * 1e-2))
    plain = fit(module(), tmp_path, 9)
    assert torch.equal(trained.sae.b_enc[SILENT:], plain.sae.b_enc[SILENT:])


def test_the_learning_rate_is_that_of_the_step(tmp_path: Path):
    # over the last 10 of 20 steps it falls in a line to zero: 1, .9, .8, ... .1 of it are left
    trained = fit(module(lr_decay_steps=10), tmp_path, 20, ReviveSilent(window=10, rate=1.0))
    assert_close(float(trained.sae.b_enc[0]), -6.0 + 1e-2 * 5.5)


def test_with_accumulated_gradients_it_rises_once_an_optimizer_step(tmp_path: Path):
    trained = fit(module(), tmp_path, 4, ReviveSilent(window=2), accumulate_grad_batches=3)
    # 12 batches; silent for more than two of them at each of the four steps
    assert_close(trained.sae.b_enc[:SILENT], torch.full((SILENT,), -6.0 + 4 * 4.0 * 1e-2))


@pytest.mark.parametrize("architecture", ["aen", "aen_gated", "standard", "gated"])
def test_features_come_back(architecture: str, tmp_path: Path):
    def n_alive(*callbacks: Any) -> int:
        trained = fit(module(architecture=architecture, lr=2e-2), tmp_path, 150, *callbacks)
        acts = trained.sae.encode(batch_at(500, batch_size=512, d_in=16))
        return int((acts[:, :SILENT] > 0).any(dim=0).sum())

    assert n_alive() == 0
    assert n_alive(ReviveSilent(window=5)) == SILENT


def test_topk_and_a_hard_phase_take_it_too(tmp_path: Path):
    hard = fit(module(), tmp_path, 9, HardFinish(4, at=2), ReviveSilent(window=4))
    topk = SAEModule({"architecture": "topk", "d_in": 16, "d_sae": 48, "k": 4}, seed=0, lr=1e-2)
    with torch.no_grad():
        topk.sae.b_enc[:SILENT] = -6.0
    for trained in (hard, fit(topk, tmp_path, 9, ReviveSilent(window=4))):
        assert (trained.sae.b_enc[:SILENT] > -6.0 + 4 * 4.0 * 1e-2).all()


def test_a_sweep_raises_each_of_its_saes_by_who_is_silent_in_it(tmp_path: Path):
    swept = SweepModule({**FIELDS, "l1_coefficient": [0.02, 0.03]}, seed=0, lr=1e-2)
    first, second = swept.saes.values()
    with torch.no_grad():
        first.b_enc[0], second.b_enc[1] = -6.0, -7.0
    fit(swept, tmp_path, 9, ReviveSilent(window=4))
    assert_close([float(first.b_enc[0]), float(second.b_enc[1])], [-6.0 + 0.2, -7.0 + 0.2])
    assert float(first.b_enc[1]) > -1.0 < float(second.b_enc[0])


def test_a_refit_keeps_its_support(tmp_path: Path):
    with_it = fit(module(seed=3), tmp_path, 12, RefitFinish(at=6), ReviveSilent(window=7))
    without = fit(module(seed=3), tmp_path, 12, RefitFinish(at=6))
    for name, parameter in with_it.sae.named_parameters():
        assert torch.equal(parameter, dict(without.sae.named_parameters())[name])


def test_a_resumed_run_goes_on_as_the_whole_one(tmp_path: Path):
    whole = fit(module(), tmp_path, 12, ReviveSilent(window=4))
    trainer = make_trainer(tmp_path, 6, callbacks=[ReviveSilent(window=4)])
    trainer.fit(module(), loader())
    trainer.save_checkpoint(tmp_path / "at6.ckpt")
    resumed = module()
    again = make_trainer(tmp_path, 12, callbacks=[ReviveSilent(window=4)])
    again.fit(resumed, loader(start=6), ckpt_path=tmp_path / "at6.ckpt", weights_only=True)
    assert torch.equal(resumed.sae.b_enc, whole.sae.b_enc)
    assert_close(float(resumed.sae.b_enc[0]), -6.0 + 8 * 4.0 * 1e-2)


def test_an_sae_without_a_bias_is_refused_before_any_work(tmp_path: Path):
    trained = SAEModule({"architecture": "matching_pursuit", "d_in": 16, "d_sae": 48})
    with pytest.raises(
        ValueError,
        match="ReviveSilent raises the encoder's bias, which architecture 'matching_pursuit' does not",
    ):
        fit(trained, tmp_path, 1, ReviveSilent())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, r"ReviveSilent.window must be .*, got 0"),
        ({"window": 1.5}, r"ReviveSilent.window must be .*, got 1.5"),
        ({"rate": 0.0}, r"ReviveSilent.rate must be a finite number > 0, got 0.0"),
        ({"rate": float("nan")}, r"ReviveSilent.rate must be a finite number > 0, got nan"),
    ],
)
def test_values_out_of_range_are_refused(arguments: Any, message: str):
    with pytest.raises(ValueError, match=message):
        ReviveSilent(**arguments)


def test_a_module_that_does_not_count_is_refused_before_any_work(tmp_path: Path):
    with pytest.raises(
        TypeError, match="ReviveSilent needs a module with counts by name as `silent_steps`, got BoringModel"
    ):
        make_trainer(tmp_path, 1, callbacks=[ReviveSilent()]).fit(BoringModel())
