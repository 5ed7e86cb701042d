"""``preset`` on the command line: what it adds, who wins, and what the saved config says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import SAE, JumpReLUSAE

from aen_lightning.callbacks import HardFinish, InitializeFromData, TargetL0
from aen_lightning.cli.main import main
from aen_lightning.cli.training import AENCLI
from aen_lightning.training.module import SAEModule, SweepModule

DEBUG = ["--trainer.max_steps=20", "--trainer.val_check_interval=10", "--trainer.enable_progress_bar=false"]


@pytest.fixture(autouse=True)
def _own_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["aen"])  # Lightning looks at it


def parsed(*args: str, module: Any = SAEModule) -> AENCLI:
    return AENCLI(module, args, run=False)


def own(tmp_path: Path, text: str) -> str:
    file = tmp_path / "own.yaml"
    file.write_text(
        "data: {class_path: SpikedDataModule, init_args: {d_in: 32, n_features: 64, k: 4}}\n"
        "trainer: {max_steps: 20, accelerator: cpu}\n" + text
    )
    return str(file)


SAE_32 = "model: {sae: {d_in: 32, d_sae: 64}}\n"


def test_preset_paper_of_pythia_is_the_published_run():
    cli = parsed("--config", "pythia-70m", "--preset", "paper")
    cfg, settings = cli.model.sae.cfg, cli.model.optimizer_settings
    published = {
        "d_in": 512, "d_sae": 4096, "l1_coefficient": 512 * 1e-3, "l2_coefficient": 512 * 5e-4, "gamma": 0.5,
        "ema_decay": 0.9999, "reference_fraction": 0.05, "weight_min": 0.01, "weight_max": 10.0,
        "warmup_delay_steps": 4000, "warmup_ramp_steps": 2000, "l1_warmup_steps": 0, "starvation_guard": 0.0,
        "penalty": "l1", "remove_radial_gradient": False, "decoder_init_norm": None, "hard_k": None,
        "apply_b_dec_to_input": True,
    }  # fmt: skip
    assert {key: getattr(cfg, key) for key in published} == pytest.approx(published)
    assert (settings.lr, settings.lr_decay_steps, settings.lr_warm_up_steps) == (1e-3, 0, 0)
    assert settings.optimizer == "torch.optim.Adam"
    assert (cli.trainer.max_steps, cli.trainer.gradient_clip_val) == (25_000, 512.0)
    names = {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert not names & {"TargetL0", "HardFinish", "InitializeFromData"}


@pytest.mark.parametrize("recipe", ["pythia-70m", "gpt2-small", "smollm2-135m"])
def test_recommended_is_the_default_of_the_recipes_for_language_models(recipe: str):
    cli = parsed("--config", recipe, "--l0", "48")
    assert cli.model.sae.cfg.starvation_guard == 0.1
    assert cli.model.optimizer_settings.lr_decay_steps == 0.2
    found = {type(callback): callback for callback in cli.trainer.callbacks}
    assert (found[TargetL0].l0, found[HardFinish].k) == (48, 48)
    assert InitializeFromData in found
    assert cli.config.expanded_preset == "recommended"


def test_a_recipe_says_what_paper_means_in_it():
    cli = parsed("--config", "smollm2-135m", "--preset", "paper")
    cfg = cli.model.sae.cfg
    assert cfg.l1_coefficient == pytest.approx(576 * 4e-3)
    assert (cfg.gamma, cfg.warmup_delay_steps, cfg.ema_decay) == (0.5, 150, 0.99)
    assert (cli.model.optimizer_settings.lr, cli.model.optimizer_settings.lr_decay_steps) == (1e-3, 60)


def test_what_is_given_wins(tmp_path: Path):
    config = own(
        tmp_path,
        "preset: recommended\n"
        "presets: {recommended: {trainer: {gradient_clip_val: 3.0}, model: {lr: 5.0e-3, sae: {gamma: 0.75}}}}\n"
        "model: {lr_decay_steps: 7, sae: {d_in: 32, d_sae: 64, l1_coefficient: 0.5}}\n",
    )
    cli = parsed(
        "--config", config, "--model.sae.starvation_guard=0.3",
        "--trainer.callbacks+=aen_lightning.callbacks.TargetL0", "--trainer.callbacks.l0=5",
    )  # fmt: skip
    cfg, settings = cli.model.sae.cfg, cli.model.optimizer_settings
    assert (cfg.l1_coefficient, cfg.starvation_guard, cfg.gamma, cfg.ema_decay) == (0.5, 0.3, 0.75, 0.99)
    assert (settings.lr, settings.lr_decay_steps) == (5e-3, 7)
    assert cli.trainer.gradient_clip_val == 3.0
    (target,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, TargetL0)]
    (finish,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, HardFinish)]
    assert (target.l0, finish.k) == (5, 5)  # the preset's callback agrees with the given one
    assert (
        parsed("--config", config, "--model.lr=1e-3").model.optimizer_settings.lr == 1e-3
    )  # the default, given


def test_a_sweep_takes_a_preset_for_every_member(tmp_path: Path):
    config = own(
        tmp_path, "model: {sae: [{d_in: 32, d_sae: [64, 128]}, {d_in: 32, d_sae: 64, gamma: 1.0}]}\n"
    )
    cli = parsed("--config", config, "--preset=recommended", "--l0=4", module=SweepModule)
    assert [sae.cfg.gamma for sae in cli.model.saes.values()] == [0.0, 0.0, 1.0]
    assert all(sae.cfg.starvation_guard == 0.1 for sae in cli.model.saes.values())


def test_the_saved_config_is_the_expanded_one_and_repeats_the_run(tmp_path: Path):
    args = ["fit", "--config", own(tmp_path, SAE_32), *DEBUG]
    assert (
        main([*args, "--preset=recommended", "--l0=4", f"--trainer.default_root_dir={tmp_path / 'a'}"]) == 0
    )
    saved = tmp_path / "a" / "version_0" / "config.yaml"
    config = yaml.safe_load(saved.read_text())
    assert config["preset"] is None
    assert config["expanded_preset"] == "recommended"
    assert config["model"]["sae"]["starvation_guard"] == 0.1
    assert config["model"]["lr"] == 3e-3
    paths = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert paths == ["InitializeFromData", "TargetL0", "HardFinish"]
    assert main(["fit", "--config", str(saved), f"--trainer.default_root_dir={tmp_path / 'b'}"]) == 0
    first, second = (SAE.load_from_disk(tmp_path / x / "version_0" / "sae" / "final") for x in "ab")
    assert type(first) is JumpReLUSAE
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset=recomended"], "unknown preset 'recomended' (did you mean 'recommended'?)"),
        (
            ["--preset=recommended", "--model.sae={architecture: topk, d_in: 32, d_sae: 64, k: 4}"],
            "preset 'recommended' is for architecture aen, not for 'topk': use preset null",
        ),
        (["--preset=paper", "--l0=4"], "l0 is for preset 'recommended', got l0 4 with preset paper"),
        (["--l0=4"], "l0 is for preset 'recommended', got l0 4 with preset null"),
        (["--preset=paper", "--presets={papr: {}}"], "presets has 'papr', which is no preset"),
        (
            ["--preset=paper", "--presets={paper: {data: {}}}"],
            "presets.paper takes the sections model and trainer, got data: {}",
        ),
        (
            ["--preset=paper", "--presets={paper: {model: {lrr: 1}}}"],
            "presets.paper sets what is no setting",
        ),
        (
            ["--preset=paper", "--expanded_preset=recommended"],
            "this config holds the settings of preset 'recommended'",
        ),
    ],
)
def test_what_is_wrong_with_a_preset_is_one_line(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["fit", "--config", own(tmp_path, SAE_32), *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
