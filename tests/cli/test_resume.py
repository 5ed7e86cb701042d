"""``aen fit``, ``sweep`` and ``refit`` that were cut off, as a person starts them again."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aen_lightning.cli.main import main
from aen_lightning.cli.resume import remove_failed_start, resume_line
from aen_lightning.training.settings import differences, settings_of_config

QUICK = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.val_check_interval=10",
         "--data.init_args.n_eval_samples=256"]  # fmt: skip
SAVING = [
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=10",
    "--trainer.callbacks.save_top_k=-1",
]


@pytest.fixture(autouse=True)
def _own_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["aen"])  # Lightning looks at it


def fit(root: Path, *args: str, steps: int = 20) -> int:
    where = [f"--trainer.default_root_dir={root}", f"--trainer.max_steps={steps}"]
    return main(["fit", "--config", "debug", *where, *QUICK, *SAVING, *args])


def weights(root: Path, version: int) -> dict[str, torch.Tensor]:
    return load_file(root / f"version_{version}" / "sae" / "final" / "sae_weights.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def steps_of(root: Path, version: int) -> list[int]:
    lines = (root / f"version_{version}" / "metrics.csv").read_text().splitlines()
    at = lines[0].split(",").index("step")
    return [int(line.split(",")[at]) for line in lines[1:]]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model.lr=0.01"], "model.lr was 0.001, now 0.01"),
        (["--model.sae.gamma=0.9"], "model.sae.gamma was not set, now 0.9"),
        (["--model.sae.d_sae=128"], "model.sae.d_sae was 64, now 128"),
        (
            ["--model.sae={architecture: topk, d_in: 32, d_sae: 64, k: 4}"],
            "model.sae.architecture was 'aen', now 'topk'",
        ),
        (["--data.init_args.seed=3"], "data.init_args.seed was 0, now 3"),
        (["--trainer.gradient_clip_val=1.0"], "trainer.gradient_clip_val was None, now 1.0"),
    ],
)
def test_a_resume_with_other_settings_is_refused_with_the_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str
):
    assert fit(tmp_path, steps=10) == 0
    (checkpoint,) = (tmp_path / "version_0" / "checkpoints").glob("*.ckpt")
    assert fit(tmp_path, f"--ckpt_path={checkpoint}", *args) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "--force_resume" in error
    assert not (tmp_path / "version_1").exists()


def test_with_force_it_goes_on_and_says_what_differs(tmp_path: Path):
    assert fit(tmp_path, steps=10) == 0
    (checkpoint,) = (tmp_path / "version_0" / "checkpoints").glob("*.ckpt")
    with pytest.warns(UserWarning, match=r"data\.init_args\.seed was 0, now 3"):
        assert (
            fit(tmp_path, f"--ckpt_path={checkpoint}", "--data.init_args.seed=3", "--force_resume=true") == 0
        )
    assert min(steps_of(tmp_path, 1)) >= 10


@pytest.mark.parametrize("how", ["--resume=auto", "--ckpt_path=last"])
def test_it_goes_on_from_the_newest_whole_checkpoint_of_the_newest_run_of_the_recipe(
    tmp_path: Path, how: str
):
    root = tmp_path / "root"
    assert fit(tmp_path / "whole", steps=40) == 0
    assert fit(root, steps=30) == 0
    assert fit(root, "--model.lr=0.5", steps=10) == 0  # a newer run, of another recipe
    at = {int(p.stem.rpartition("=")[2]): p for p in (root / "version_0" / "checkpoints").glob("*.ckpt")}
    assert sorted(at) == [10, 20, 30]
    damaged = bytearray(at[30].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    at[30].write_bytes(damaged)
    with pytest.warns(UserWarning, match="step=30.ckpt is damaged"):
        assert fit(root, how, steps=40) == 0
    assert_same(weights(root, 2), weights(tmp_path / "whole", 0))
    assert min(steps_of(root, 2)) >= 20


def test_where_nothing_is_there_auto_begins_and_last_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert fit(tmp_path, "--ckpt_path=last") == 2
    assert "no last checkpoint" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert fit(tmp_path, "--resume=auto", steps=10) == 0
    assert fit(tmp_path, "--resume=auto", "--ckpt_path=last") == 2
    assert "not both" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert fit(tmp_path, steps=10) == 0
    (checkpoint,) = (tmp_path / "version_0" / "checkpoints").glob("*.ckpt")
    damaged = bytearray(checkpoint.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    checkpoint.write_bytes(damaged)
    assert fit(tmp_path, f"--ckpt_path={checkpoint}") == 2
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "version_1").exists()


def test_a_failed_start_leaves_no_folder(tmp_path: Path):
    assert fit(tmp_path, "--data.init_args.d_in=16") == 2
    assert not list(tmp_path.glob("version_*"))


def test_a_folder_with_numbers_or_weights_stays(tmp_path: Path):
    for name in ("metrics.csv", "sae/step_1/cfg.json", "checkpoints/a.ckpt"):
        folder = tmp_path / name.partition("/")[0]
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
        remove_failed_start(folder)
        assert (folder / name).exists()


def test_the_line_that_resumes_takes_the_place_of_the_old_checkpoint():
    args = [
        "--config",
        "debug",
        "--ckpt_path",
        "old.ckpt",
        "--resume=auto",
        "--ckpt-path=older",
        "--model.lr=1",
    ]
    line = resume_line("fit", args, Path("a b/new.ckpt"))
    assert shlex.split(line) == [
        "aen",
        "fit",
        "--config",
        "debug",
        "--model.lr=1",
        "--ckpt_path",
        "a b/new.ckpt",
    ]


def started(root: Path, *args: str) -> subprocess.Popen[str]:
    words = [
        "fit",
        "--config",
        "debug",
        f"--trainer.default_root_dir={root}",
        "--trainer.max_steps=2000",
        *QUICK,
        *args,
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "aen_lightning", *words, "--trainer.val_check_interval=500"],
        cwd=Path(__file__).parents[2], text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_with_its_code_and_the_line_that_resumes(
    tmp_path: Path, signum: int, code: int
):
    process = started(tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("version_0/metrics.csv")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signum)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == code, error
    line = shlex.split(error.strip().splitlines()[-1])
    assert line[:2] == ["aen", "fit"]
    assert line[-2:] == ["--ckpt_path", str(tmp_path / "version_0" / "checkpoints" / "interrupted.ckpt")]
    assert (tmp_path / "version_0" / "sae" / "interrupted" / "cfg.json").is_file()


def test_a_refit_goes_on_from_its_checkpoint(tmp_path: Path):
    assert fit(tmp_path / "trained", steps=20) == 0
    dictionary = tmp_path / "trained" / "version_0" / "sae" / "final"

    def refit(root: Path, steps: int, *args: str) -> int:
        data = json.dumps({"class_path": "aen_lightning.data.SpikedDataModule", "init_args": {
            "d_in": 32, "n_features": 64, "k": 4, "rho": 0.0, "train_batch_size_tokens": 128, "n_eval_samples": 256}})  # fmt: skip
        words = [f"--model.dictionary={dictionary}", f"--data={data}", f"--trainer.default_root_dir={root}"]
        return main(
            [
                "refit",
                *words,
                "--trainer.accelerator=cpu",
                f"--trainer.max_steps={steps}",
                *QUICK[:3],
                *SAVING,
                *args,
            ]
        )

    assert refit(tmp_path / "whole", 20) == 0
    assert refit(tmp_path / "cut", 10) == 0
    assert refit(tmp_path / "cut", 20, "--resume=auto") == 0
    assert_same(weights(tmp_path / "cut", 1), weights(tmp_path / "whole", 0))
    tables = [(tmp_path / name / "refit.csv").read_text() for name in ("cut/version_1", "whole/version_0")]
    assert tables[0] == tables[1]


def test_a_dictionary_of_the_command_is_evaluated_on_its_own_data(tmp_path: Path):
    assert fit(tmp_path, steps=10) == 0
    final = tmp_path / "version_0" / "sae" / "final"
    assert not any(
        key.startswith("_")
        for key in json.loads((final / "cfg.json").read_text())["metadata"]["synthetic_data"]
    )
    assert main(["evaluate", str(final), "--n_tokens=512"]) == 0
    cfg: dict[str, Any] = json.loads((final / "cfg.json").read_text())
    cfg["metadata"]["synthetic_data"]["_class_path"] = (
        "aen_lightning.data.SpikedDataModule"  # of an earlier version
    )
    (final / "cfg.json").write_text(json.dumps(cfg))
    assert main(["evaluate", str(final), "--n_tokens=512"]) == 0


def test_settings_leave_out_what_changes_nothing():
    config = {
        "seed_everything": 0, "model": {"lr": 1}, "data": {"class_path": "D", "init_args": {"path": "/a/set", "seed": 1}},
        "trainer": {"max_steps": 5, "callbacks": [
            {"class_path": "aen_lightning.callbacks.TargetL0", "init_args": {"target": 3}},
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_top_k": 2}}]},
    }  # fmt: skip
    old = settings_of_config(config)
    assert old["callbacks"] == {"TargetL0": {"target": 3}}
    config["data"]["init_args"] = {
        "path": "/b/set",
        "seed": 2,
    }  # moved, which does not matter, and another seed
    config["trainer"]["callbacks"] = []
    new = settings_of_config(config)
    assert differences(old, new) == [
        "data.init_args.seed was 1, now 2",
        "callbacks.TargetL0.target was 3, now not set",
    ]
    assert differences({"model": {"lr": 1}}, {"model": {"lr": 1, "of_a_later_version": 2}}) == []
