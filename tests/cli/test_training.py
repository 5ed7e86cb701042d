"""``aen fit | validate | test`` from end to end, on data small enough for a test."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from sae_lens import SAE, StandardSAE, TopKSAE

import aen_lightning
from aen_lightning.cli.main import main
from tests.support.tiny_models import save_tiny_model

QUICK = [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=5",
]


@pytest.fixture(autouse=True)
def _own_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["aen"])  # Lightning looks at it


def fit(tmp_path: Path, *args: str) -> int:
    where = [
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.max_steps=20",
        "--trainer.val_check_interval=10",
    ]
    return main(["fit", "--config", "debug", *where, *QUICK, *args])


def run_folder(tmp_path: Path) -> Path:
    (folder,) = tmp_path.glob("version_*")
    return folder


def test_fit_leaves_logs_a_checkpoint_a_config_and_a_dictionary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert fit(tmp_path) == 0
    folder = run_folder(tmp_path)
    with (folder / "metrics.csv").open() as f:
        assert max(int(row["step"]) for row in csv.DictReader(f)) == 19
    assert list(folder.glob("events.out.tfevents*"))
    assert [p.name for p in (folder / "checkpoints").glob("*.ckpt")] == ["epoch=0-step=20.ckpt"]
    sae = SAE.load_from_disk(folder / "sae" / "final")
    assert type(sae) is StandardSAE
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (32, 64)
    assert "Tip:" not in capsys.readouterr().err + caplog.text


def test_saved_config_reloads_and_gives_the_same_dictionary(tmp_path: Path) -> None:
    assert fit(tmp_path / "a") == 0
    saved = run_folder(tmp_path / "a") / "config.yaml"
    assert main(["fit", "--config", str(saved), f"--trainer.default_root_dir={tmp_path / 'b'}"]) == 0
    first, second = (SAE.load_from_disk(run_folder(tmp_path / x) / "sae" / "final") for x in "ab")
    assert torch.equal(first.W_dec, second.W_dec)


def test_values_are_overridden_one_by_one_and_the_dict_form_stays(tmp_path: Path) -> None:
    assert fit(tmp_path, "--model.sae.gamma=0.9", "--model.lr=0.01", "--trainer.precision=bf16-mixed") == 0
    config = yaml.safe_load((run_folder(tmp_path) / "config.yaml").read_text())
    recipe = yaml.safe_load(aen_recipe("debug"))
    assert config["model"]["sae"] == recipe["model"]["sae"] | {"gamma": 0.9}
    assert config["model"]["lr"] == 0.01
    assert config["trainer"]["precision"] == "bf16-mixed"


def aen_recipe(name: str) -> str:
    return (Path(aen_lightning.__file__).parent / "recipes" / f"{name}.yaml").read_text()


def test_a_baseline_is_one_override(tmp_path: Path) -> None:
    assert fit(tmp_path, "--model.sae={architecture: topk, d_in: 32, d_sae: 64, k: 4}") == 0
    sae = SAE.load_from_disk(run_folder(tmp_path) / "sae" / "final")
    assert type(sae) is TopKSAE
    assert sae.cfg.k == 4


def test_validate_and_test_read_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path) == 0
    (checkpoint,) = (run_folder(tmp_path) / "checkpoints").glob("*.ckpt")
    trained = {}
    for command in ("validate", "test"):
        for name, args in (("fresh", []), ("trained", [f"--ckpt_path={checkpoint}"])):
            folder = tmp_path / command / name
            where = f"--trainer.default_root_dir={folder}"
            assert main([command, "--config", "debug", where, *QUICK, *args]) == 0
            header, values = (run_folder(folder) / "metrics.csv").read_text().splitlines()
            row = dict(zip(header.split(","), values.split(","), strict=True))
            (trained[name],) = [
                float(v) for key, v in row.items() if key.endswith("metrics/explained_variance")
            ]
        assert trained["trained"] > trained["fresh"]


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_one_line(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); "  # a write then fails as on a full disk
        "from aen_lightning.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [
        "fit",
        "--config",
        "debug",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.logger=false",
        *QUICK,
    ]
    root = Path(aen_lightning.__file__).parents[1]
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(r"^aen fit: error: .*File too large: '\S+/sae/\w+'$", done.stderr.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("command", "recipe"), [("fit", "debug"), ("sweep", "spiked-sweep")])
def test_two_processes_run_the_same_command_and_rank_0_answers(
    tmp_path: Path, command: str, recipe: str
) -> None:
    args = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu", "--trainer.max_steps=4",
            "--trainer.val_check_interval=4", "--trainer.limit_val_batches=2",
            f"--trainer.default_root_dir={tmp_path}"]  # fmt: skip
    words = [sys.executable, "-m", "aen_lightning", command, "--config", recipe, "--json", *args, *QUICK]
    root = Path(aen_lightning.__file__).parents[1]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert Path(result["folder"]) == run_folder(tmp_path)
    if command == "sweep":
        rows = (run_folder(tmp_path) / "sweep.csv").read_text().splitlines()
        assert len(rows) == 1 + 8 == 1 + len(result["members"])


def text_run(tmp_path: Path, *args: str) -> int:
    model = save_tiny_model("llama", tmp_path)
    rows = torch.randint(4, 64, (300, 40), generator=torch.Generator().manual_seed(0)).tolist()
    text = "".join(json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n" for row in rows)
    (tmp_path / "text.jsonl").write_text(text)
    settings = {
        "model.sae.d_in": 16, "model.sae.d_sae": 64, "model.lr_decay_steps": 0, "trainer.max_steps": 12,
        "trainer.val_check_interval": 12, "trainer.default_root_dir": tmp_path / "run", "num_threads": 1,
        "data.init_args.model_name": model, "data.init_args.dataset_path": tmp_path / "text.jsonl",
        "data.init_args.hook_name": "blocks.1.hook_resid_post", "data.init_args.context_size": 16,
        "data.init_args.train_batch_size_tokens": 64,
    }  # fmt: skip
    words = [f"--{key}={value}" for key, value in settings.items()]
    return main(["fit", "--config", "smollm2-135m", *words, *QUICK, *args])


def test_fit_on_a_language_model_from_end_to_end(tmp_path: Path) -> None:
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
        (["--data.dataset-path=missing.jsonl"], "missing.jsonl"),
        (["--data.datset_path=missing.jsonl"], "(did you mean 'dataset_path'?)"),
    ],
)
def test_what_does_not_fit_the_model_is_one_line_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert text_run(tmp_path, *args) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aen fit: error:")]
    assert message in error
    assert not list((tmp_path / "run").rglob("*.safetensors"))
