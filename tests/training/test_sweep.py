from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from sae_lens import SAE
from torch.testing import assert_close

from aen_lightning.callbacks import DeadFeatureTracker
from aen_lightning.cli.main import main
from aen_lightning.training.grid import expand_grid
from aen_lightning.training.module import SAEModule, SweepModule
from aen_lightning.training.pareto import pareto_fronts
from tests.support.streams import loader
from tests.support.training import SAE_FIELDS, make_trainer

GRID: list[dict[str, Any]] = [
    {**SAE_FIELDS, "l1_coefficient": [0.05, 0.5]},
    {"architecture": "topk", "d_in": 16, "d_sae": [32, 48], "k": 4},
]


def test_every_member_ends_where_a_separate_run_ends(tmp_path: Path):
    trackers = [DeadFeatureTracker(window_steps=20)]
    sweep = SweepModule(GRID, seed=[3, 4], dead_feature_window=10)
    trainer = make_trainer(tmp_path, 50, callbacks=trackers, log_every_n_steps=10)
    trainer.fit(sweep, loader())
    assert len(sweep.members) == 8
    for member in sweep.members:
        alone = SAEModule(member.sae, seed=member.seed, dead_feature_window=10)
        tracker = DeadFeatureTracker(window_steps=20)
        alone_trainer = make_trainer(tmp_path, 50, callbacks=[tracker], log_every_n_steps=10)
        alone_trainer.fit(alone, loader())
        for name, value in alone.sae.state_dict().items():
            assert torch.equal(sweep.saes[member.name].state_dict()[name], value), f"{member.name}: {name}"
        for key, logged in alone_trainer.callback_metrics.items():
            if key.startswith(("metrics/", "losses/", "sparsity/")):
                assert trainer.callback_metrics[f"{member.name}/{key}"] == logged, f"{member.name}: {key}"
        density, expected = trackers[0].density(member.name), tracker.density()
        assert density is not None
        assert expected is not None
        assert torch.equal(density, expected)


def test_clipping_is_per_sae(tmp_path: Path):
    # were the norm common, the wild member would shrink the tame one's steps
    tame, wild = {**SAE_FIELDS}, {**SAE_FIELDS, "l1_coefficient": 1e4, "l1_warmup_steps": 0}
    sweep = SweepModule([tame, wild], seed=0)
    make_trainer(tmp_path, 5, gradient_clip_val=0.1).fit(sweep, loader())
    alone = SAEModule(tame, seed=0)
    make_trainer(tmp_path, 5, gradient_clip_val=0.1).fit(alone, loader())
    assert torch.equal(next(iter(sweep.saes.values())).W_enc, alone.sae.W_enc)


def test_each_sae_has_its_export_folder_and_a_checkpoint_restores_all(tmp_path: Path):
    sweep = SweepModule(GRID, seed=0)
    trainer = make_trainer(tmp_path, 6)
    trainer.fit(sweep, loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    read = SweepModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    x = torch.randn(8, 16)
    for name, sae in sweep.saes.items():
        # SAELens folds norms into a TopK dictionary on export, which rounds
        assert_close(SAE.load_from_disk(tmp_path / "sae" / "final" / name)(x), sae(x), msg=name)
        assert torch.equal(read.saes[name](x), sae(x)), name


def test_grid_names_and_order_by_hand():
    members = expand_grid({"d_in": 4, "d_sae": [8, 16], "gamma": [0.0, 0.5]}, seed=[1, 2])
    assert [m.name for m in members] == [
        "d_sae=8-gamma=0.0-seed=1",
        "d_sae=8-gamma=0.0-seed=2",
        "d_sae=8-gamma=0.5-seed=1",
        "d_sae=8-gamma=0.5-seed=2",
        "d_sae=16-gamma=0.0-seed=1",
        "d_sae=16-gamma=0.0-seed=2",
        "d_sae=16-gamma=0.5-seed=1",
        "d_sae=16-gamma=0.5-seed=2",
    ]
    assert members[3].sae == {"d_in": 4, "d_sae": 8, "gamma": 0.5}
    assert members[3].varied == {"d_sae": 8, "gamma": 0.5, "seed": 2}


def test_members_of_several_blocks_are_named_by_as_little_as_tells_them_apart():
    aen = {
        "architecture": "aen",
        "d_in": 4,
        "d_sae": 8,
        "lambda_1": [1e-3, 2e-3],
        "lambda_2": 1e-4,
        "ema_decay": 0.99,
    }
    l1 = {
        "architecture": "aen",
        "d_in": 4,
        "d_sae": 8,
        "lambda_1": [1e-3, 2e-3],
        "lambda_2": 0.0,
        "gamma": 0.0,
    }
    topk = {"architecture": "topk", "d_in": 4, "d_sae": 8, "k": 2}
    members = expand_grid([aen, l1, topk], seed=0)
    assert [m.name for m in members] == [
        "aen-lambda_1=0.001-lambda_2=0.0001",
        "aen-lambda_1=0.002-lambda_2=0.0001",
        "aen-lambda_1=0.001-lambda_2=0.0",
        "aen-lambda_1=0.002-lambda_2=0.0",
        "topk",
    ]
    assert members[0].varied == {"architecture": "aen", "lambda_1": 1e-3, "lambda_2": 1e-4, "ema_decay": 0.99}


def test_a_field_that_is_a_list_by_nature_varies_as_a_list_of_lists():
    base = {"architecture": "matryoshka_batchtopk", "d_in": 4, "d_sae": 8, "k": 2}
    assert len(expand_grid({**base, "matryoshka_widths": [4, 8]}, seed=0)) == 1
    assert len(expand_grid({**base, "matryoshka_widths": [[4, 8], [2, 8]]}, seed=0)) == 2


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        ([], "the sweep has no member"),
        ({"d_in": 4, "d_sae": 8, "gamma": []}, "the sweep has no member"),
        ({"d_in": 4, "d_sae": 8, "gamma": [0.5, 0.5]}, "has 'sae' more than once"),
    ],
)
def test_grids_that_make_no_sense_are_refused(sae: Any, message: str):
    with pytest.raises(ValueError, match=message):
        expand_grid(sae, seed=0)


def test_a_misspelt_key_in_one_member_is_named_before_any_work():
    with pytest.raises(ValueError, match="no key 'lamda_1' for architecture 'aen'"):
        SweepModule([SAE_FIELDS, {"d_in": 16, "d_sae": 8, "lamda_1": [1, 2]}])


def test_pareto_front_by_hand():
    table = pd.DataFrame(
        {
            "name": list("abcde"),
            "architecture": ["aen"] * 4 + ["topk"],
            "l0": [10.0, 20.0, 30.0, 40.0, 5.0],
            "explained_variance": [0.5, 0.4, 0.7, 0.7, 0.1],
            "dead_features_pct": [9.0, 3.0, 3.0, 1.0, 50.0],
        }
    )
    up = pareto_fronts(table, "explained_variance", higher_is_better=True)
    assert {a: [p["name"] for p in front] for a, front in up.items()} == {"aen": ["a", "c"], "topk": ["e"]}
    down = pareto_fronts(table, "dead_features_pct", higher_is_better=False)
    assert [p["name"] for p in down["aen"]] == ["a", "b", "d"]


def test_the_command_writes_one_table_and_the_pareto_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["aen"])
    args = [
        "sweep",
        "--config",
        "debug",
        "--model.sae.lambda_1=[1.0e-3, 5.0e-3]",
        "--model.seed=[0, 1]",
        "--trainer.max_steps=20",
    ]
    args += [
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.enable_progress_bar=false",
        "--trainer.val_check_interval=20",
    ]
    assert main(args) == 0
    (folder,) = tmp_path.glob("version_*")
    table = pd.read_csv(folder / "sweep.csv")
    assert list(table["lambda_1"]) == [1e-3, 1e-3, 5e-3, 5e-3]
    assert list(table["seed"]) == [0, 1, 0, 1]
    assert table["l0"].between(0.1, 64).all()
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "sweep.parquet"), table, check_dtype=False)
    pareto = json.loads((folder / "pareto.json").read_text())
    names = {point["name"] for point in pareto["explained_variance"]["aen"]}
    assert names
    assert names <= set(table["name"])
    for name in table["name"]:
        assert SAE.load_from_disk(folder / "sae" / "final" / name).cfg.d_sae == 64
    assert "lambda_1=0.005-seed=1" in capsys.readouterr().out


def test_a_sweep_refuses_data_of_another_width(tmp_path: Path):
    class Data(pl.LightningDataModule):
        d_in = 24

        def train_dataloader(self) -> Any:
            return loader()

    with pytest.raises(ValueError, match="the SAE has d_in=16, but Data gives activations of width 24"):
        make_trainer(tmp_path, 1).fit(SweepModule(GRID), datamodule=Data())
