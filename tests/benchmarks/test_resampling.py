"""Resampling of dead features: they fire again, in the direction of tokens, and nothing else moves."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch

from aen_lightning import SAEModule
from tests.support.streams import batch_at, loader
from tests.support.training import make_trainer


class Look(pl.Callback):
    """Runs after the resampling, before the step."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 6:
            sae = module.sae
            self.weights = {name: p.detach().clone() for name, p in sae.named_parameters()}
            self.moments = {
                name: trainer.optimizers[0].state[p]["exp_avg"].clone() for name, p in sae.named_parameters()
            }


class LookBefore(Look):
    """Runs before the resampling."""


def test_dead_features_start_anew_and_the_others_stay(load_script, tmp_path: Path):
    resampling = load_script("resampling")
    torch.manual_seed(0)
    module = SAEModule(
        {
            "architecture": "standard",
            "d_in": 16,
            "d_sae": 48,
            "l1_coefficient": 0.05,
            "decoder_init_norm": 1.0,
        },
        dead_feature_window=3,
    )
    with torch.no_grad():
        module.sae.b_enc[:5] = -1e3
    before, after = LookBefore(), Look()
    callbacks = [before, resampling.ResampleDead([6]), after]
    make_trainer(tmp_path, 7, callbacks=callbacks).fit(module, loader())
    x = batch_at(6, batch_size=64, d_in=16)
    dead = torch.arange(48) < 5
    for name, at in (("W_dec", (dead,)), ("W_enc", (slice(None), dead)), ("b_enc", (dead,))):
        assert (after.moments[name][at] == 0).all(), name
        rest = (slice(None), ~dead) if name == "W_enc" else (~dead,)
        assert torch.equal(after.weights[name][rest], before.weights[name][rest]), name
        assert torch.equal(after.moments[name][rest], before.moments[name][rest]), name
    row, column = after.weights["W_dec"][dead], after.weights["W_enc"][:, dead]
    # each row is a token of that very batch
    tokens = torch.nn.functional.normalize(x - after.weights["b_dec"], dim=-1)
    torch.testing.assert_close((row @ tokens.T).max(dim=1).values, torch.ones(5))
    mean = before.weights["W_enc"][:, ~dead].norm(dim=0).mean()
    torch.testing.assert_close(column, 0.2 * mean * row.T)
    fired = ((x - after.weights["b_dec"]) @ column + after.weights["b_enc"][dead] > 0).any(0)
    assert fired.all()
