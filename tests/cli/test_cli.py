from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import SAE, StandardSAE

import aen_lightning
from aen_lightning.cli.main import COMMANDS, main
from aen_lightning.cli.recipes import find_config, recipes
from aen_lightning.saes.from_dict import build_sae_config
from aen_lightning.training.grid import expand_grid
from tests.support.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]
QUICK = [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=5",
]


@pytest.fixture(autouse=True)
def _own_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    # the training commands write the resolved recipe into sys.argv, from which Lightning starts further ranks
    monkeypatch.setattr(sys, "argv", ["aen"])


def fit(tmp_path: Path, *args: str) -> int:
    return main(
        [
            "fit",
            "--config",
            "debug",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.max_steps=20",
            "--trainer.val_check_interval=10",
            *QUICK,
            *args,
        ]
    )


def run_folder(tmp_path: Path) -> Path:
    (folder,) = tmp_path.glob("version_*")
    return folder


def test_fit_leaves_logs_a_checkpoint_a_config_and_a_dictionary(tmp_path: Path):
    assert fit(tmp_path) == 0
    folder = run_folder(tmp_path)
    assert (folder / "metrics.csv").read_text().count("\n") > 3
    assert list(folder.glob("events.out.tfevents*"))
    assert list((folder / "checkpoints").glob("*.ckpt"))
    assert type(SAE.load_from_disk(folder / "sae" / "final")) is StandardSAE


def test_saved_config_reloads_and_gives_the_same_dictionary(tmp_path: Path):
    assert fit(tmp_path / "a") == 0
    saved = run_folder(tmp_path / "a") / "config.yaml"
    assert main(["fit", "--config", str(saved), f"--trainer.default_root_dir={tmp_path / 'b'}"]) == 0
    first, second = (SAE.load_from_disk(run_folder(tmp_path / x) / "sae" / "final") for x in "ab")
    assert torch.equal(first.W_dec, second.W_dec)


def test_values_are_overridden_one_by_one(tmp_path: Path):
    assert fit(tmp_path, "--model.sae.gamma=0.9", "--model.lr=0.01", "--trainer.precision=bf16-mixed") == 0
    config = yaml.safe_load((run_folder(tmp_path) / "config.yaml").read_text())
    assert config["model"]["sae"]["gamma"] == 0.9
    assert config["model"]["lr"] == 0.01


def test_a_baseline_is_one_override(tmp_path: Path):
    assert fit(tmp_path, "--model.sae={architecture: topk, d_in: 32, d_sae: 64, k: 4}") == 0
    sae = SAE.load_from_disk(run_folder(tmp_path) / "sae" / "final")
    assert sae.cfg.architecture() in ("topk", "jumprelu")


def test_validate_and_test_read_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert fit(tmp_path) == 0
    (checkpoint,) = (run_folder(tmp_path) / "checkpoints").glob("*.ckpt")
    for command in ("validate", "test"):
        args = [
            command,
            "--config",
            "debug",
            f"--ckpt_path={checkpoint}",
            f"--trainer.default_root_dir={tmp_path / command}",
        ]
        assert main([*args, *QUICK]) == 0
        assert "metrics/explained_variance" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.sae.gamam=1"], "sae has no key 'gamam' for architecture 'aen' (did you mean 'gamma'?)"),
        (["--model.sae.d_in=48"], "the SAE has d_in=48, but SpikedDataModule gives activations of width 32"),
        (
            ["--model.sae.weight_max=0.5"],
            "AENTrainingSAEConfig.weight_max must be a finite number >= 1, got 0.5",
        ),
        (["--data.init_args.k=0"], "k must be between 1 and n_features=64, got 0"),
        (["--num_threads=0"], "num_threads must be >= 1, got 0"),
    ],
)
def test_errors_of_use_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
):
    assert fit(tmp_path, *args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.safetensors"))


def test_unknown_recipe_and_command_are_named(capsys: pytest.CaptureFixture[str]):
    assert main(["fit", "--config", "spikd"]) == 2
    assert "no config file or recipe 'spikd' (did you mean 'spiked'?)" in capsys.readouterr().err
    assert main(["fti"]) == 2
    assert "no command 'fti' (did you mean 'fit'?)" in capsys.readouterr().err


def test_recipes_are_listed_with_a_line_each_and_shown(capsys: pytest.CaptureFixture[str]):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes())
    assert all(len(line.split()) > 5 for line in lines), (
        "each recipe starts with a comment that says what it is"
    )
    assert main(["recipes", "show", "debug"]) == 0
    assert capsys.readouterr().out == find_config("recipes/debug.yaml").read_text()
    assert main(["recipes", "sho"]) == 2


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"aen-lightning {aen_lightning.__version__}\n"


def test_demo_prints_the_comparison_and_loads_the_dictionary_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["demo", "--steps", "120", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split()[1:]
        for line in out.splitlines()
        if line.startswith(("AEN", "L1 ", "TopK "))
    }
    assert set(rows) == {"AEN", "AEN+guard", "L1", "TopK"}
    assert float(rows["TopK"][0]) == 8.0
    assert "StandardSAE" in out
    assert (tmp_path / "aen" / "sae" / "final" / "cfg.json").is_file()


def clean_run(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("cwd", [ROOT, Path("/")], ids=["from the root", "from elsewhere"])
def test_callbacks_and_recipes_are_parts_of_the_package_and_nothing_else(cwd: Path):
    code = (
        "import aen_lightning.callbacks, importlib.util, sys\n"
        "from aen_lightning.cli.recipes import recipes\n"
        "assert 'debug' in recipes()\n"
        "sys.path = [p for p in sys.path if p not in ('', sys.argv[1])]\n"
        "assert importlib.util.find_spec('callbacks') is None and importlib.util.find_spec('recipes') is None"
    )
    result = clean_run("-c", code, str(ROOT), cwd=cwd)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_python_dash_m_is_the_command():
    result = clean_run("-m", "aen_lightning", "recipes", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "debug" in result.stdout


@pytest.mark.parametrize("name", list(recipes()))
def test_every_recipe_is_well_formed(name: str):
    config: dict[str, Any] = yaml.safe_load(recipes()[name].read_text())
    text = recipes()[name].read_text()
    assert f"--config {name}" in text, "the header says how to run it"
    assert "/root" not in text
    assert config


def _recipe_kind(name: str) -> str:
    last = name.rpartition("-")[2]
    return last if last in ("harvest", "refit", "sweep") else "fit"


@pytest.mark.parametrize("name", list(recipes()))
def test_every_recipe_passes_its_parser_and_its_sae_is_sound(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main([_recipe_kind(name), "--config", name, "--print_config"])
    assert exit_info.value.code == 0, capsys.readouterr().err
    sae = yaml.safe_load(recipes()[name].read_text())["model"].get("sae")
    if sae is not None:
        for member in expand_grid(sae, seed=0):
            cfg = build_sae_config(member.sae)
            assert cfg.d_sae >= 2 * cfg.d_in


def text_run(tmp_path: Path, *args: str) -> int:
    model = save_tiny_model("llama", tmp_path)
    rows = torch.randint(4, 64, (300, 40), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n" for row in rows)
    )
    return main(
        [
            *(
                "fit",
                "--config",
                "smollm2-135m",
                "--model.sae.d_in=16",
                "--model.sae.d_sae=64",
                "--trainer.max_steps=12",
            ),
            *(
                "--model.lr_decay_steps=0",
                "--trainer.val_check_interval=12",
                f"--trainer.default_root_dir={tmp_path / 'run'}",
            ),
            *(
                f"--data.init_args.model_name={model}",
                f"--data.init_args.dataset_path={tmp_path / 'text.jsonl'}",
            ),
            *("--data.init_args.hook_name=blocks.1.hook_resid_post", "--data.init_args.context_size=16"),
            *("--data.init_args.train_batch_size_tokens=64", "--num_threads=1", *QUICK, *args),
        ]
    )


def test_fit_on_a_language_model_from_end_to_end(tmp_path: Path):
    assert text_run(tmp_path) == 0
    sae = SAE.load_from_disk(run_folder(tmp_path / "run") / "sae" / "final")
    assert sae.cfg.normalize_activations == "constant_norm_rescale"
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert sae.cfg.metadata.hf_hook_name == "model.layers.1"
    assert sae.cfg.metadata.context_size == 16


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.init_args.hook_name=blocks.9.hook_resid_post"], "blocks.9.hook_resid_post"),
        (["--data.init_args.hook_name=blocks.1.hook_resid_pst"], "hook_resid_post"),
        (
            ["--model.sae.d_in=24"],
            "the SAE has d_in=24, but TextActivationsDataModule gives activations of width 16",
        ),
        (["--data.init_args.dataset_path=missing.jsonl"], "missing.jsonl"),
    ],
)
def test_what_does_not_fit_the_model_is_one_error_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
):
    assert text_run(tmp_path, *args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list((tmp_path / "run").rglob("*.safetensors"))
