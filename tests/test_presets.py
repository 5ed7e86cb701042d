from __future__ import annotations

from pathlib import Path

import pytest
from sae_lens import SAE, JumpReLUSAE

from aen_lightning.callbacks import ReviveSilent, TargetL0
from aen_lightning.presets import preset, recommended
from tests.support.streams import loader
from tests.support.training import make_trainer


def test_recommended_ends_at_its_l0_as_a_dictionary_that_saelens_loads(tmp_path: Path):
    module, callbacks = recommended(d_in=16, d_sae=48, l0=4, max_steps=60, seed=0)
    make_trainer(tmp_path, 60, callbacks=callbacks).fit(module, loader())
    assert module.sae.cfg.hard_k == 4 == module.sae.cfg.metadata["target_l0"]
    assert module.optimizer_settings.lr_decay_steps == 0.2
    read = SAE.load_from_disk(module.export(tmp_path / "sae"))
    assert type(read) is JumpReLUSAE


def test_what_is_given_wins():
    module, callbacks = recommended(
        d_in=16,
        d_sae=48,
        l0=4,
        max_steps=60,
        lr=1e-4,
        lr_decay_steps=7,
        sae={"l1_coefficient": 3.0, "gamma": 0.25},
    )
    cfg = module.sae.cfg
    assert (cfg.l1_coefficient, cfg.gamma, cfg.starvation_guard) == (3.0, 0.25, 0.1)
    assert (module.optimizer_settings.lr, module.optimizer_settings.lr_decay_steps) == (1e-4, 7)
    # the penalised phase holds more than the run is to end with
    assert [(c.l0, c.headroom) for c in callbacks if isinstance(c, TargetL0)] == [(4, 2)]


def test_without_a_hard_phase_the_penalty_holds_the_l0_itself():
    module, callbacks = recommended(d_in=16, d_sae=48, l0=4, max_steps=60, architecture="aen_gated")
    assert [(c.l0, c.headroom) for c in callbacks if isinstance(c, TargetL0)] == [(4, 1)]
    # what brings silent features back
    assert module.sae.cfg.aux_loss_coefficient == 0
    assert [(c.window, c.rate) for c in callbacks if isinstance(c, ReviveSilent)] == [(0.03, 4.0)]


def test_an_unknown_preset_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown preset 'recomended'.*recommended"):
        preset("recomended")


def test_a_preset_that_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match="preset 'recommended' is for architecture aen or aen_gated, not for 'topk'"
    ):
        recommended(d_in=16, d_sae=48, l0=4, max_steps=60, architecture="topk")
