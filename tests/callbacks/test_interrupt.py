"""Signals reach a run at any instant, and what it leaves goes on as if nothing had been."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from sae_lens import SAE, StandardSAE

from aen_lightning.callbacks import DeadFeatureTracker, Interrupted, SaveOnSignal
from aen_lightning.runs.layout import next_slurm_checkpoint
from aen_lightning.training.checkpoints import require_whole
from aen_lightning.training.module import SAEModule
from tests.support.streams import loader
from tests.support.training import SAE_FIELDS, make_trainer


class Signals(pl.Callback):
    """Sends this process a signal while batch ``at`` is worked on."""

    def __init__(self, at: int, signum: int) -> None:
        self.at, self.signum = at, signum

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fit_loop.total_batch_idx == self.at:
            signal.raise_signal(self.signum)


def make_module() -> SAEModule:
    torch.manual_seed(0)
    return SAEModule(SAE_FIELDS, lr_warm_up_steps=10)


def assert_same_state(one: SAEModule, other: SAEModule) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert one.n_training_samples == other.n_training_samples


@pytest.mark.parametrize(
    ("signum", "code", "name"), [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")]
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_stops_between_steps_and_goes_on_to_the_same_end(
    tmp_path: Path, signum: int, code: int, name: str, accumulate: int
):
    whole, settings = make_module(), {"accumulate_grad_batches": accumulate}
    make_trainer(tmp_path / "whole", 30, callbacks=[DeadFeatureTracker(25)], **settings).fit(whole, loader())

    stopped = make_trainer(
        tmp_path, 30, callbacks=[Signals(12 * accumulate, signum), DeadFeatureTracker(25)], **settings
    )
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match=f"interrupted by {name} after step 13") as raised:
        stopped.fit(make_module(), loader())
    assert raised.value.code == code
    assert signal.getsignal(signum) is before
    require_whole(raised.value.checkpoint)
    assert isinstance(SAE.load_from_disk(tmp_path / "sae" / "interrupted"), StandardSAE)
    assert not (tmp_path / "sae" / "final").exists()

    resumed = SAEModule(SAE_FIELDS, lr_warm_up_steps=10)
    tracker = DeadFeatureTracker(25)
    trainer = make_trainer(tmp_path, 30, callbacks=[tracker], **settings)
    trainer.fit(resumed, loader(start=13 * accumulate), ckpt_path=raised.value.checkpoint, weights_only=True)
    assert_same_state(whole, resumed)


def test_in_the_last_step_it_ends_as_it_would_have(tmp_path: Path):
    make_trainer(tmp_path, 5, callbacks=[Signals(4, signal.SIGTERM)]).fit(make_module(), loader())
    assert (tmp_path / "sae" / "final").is_dir()
    assert not (tmp_path / "sae" / "interrupted").exists()


def test_it_is_called_after_the_callbacks_whose_state_it_saves(tmp_path: Path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    trainer = make_trainer(tmp_path, 2, enable_checkpointing=True, callbacks=[saver])
    trainer.fit(make_module(), loader())
    assert isinstance(trainer.callbacks[-1], SaveOnSignal)
    assert trainer.checkpoint_callback is saver


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_a_slurm_job_is_requeued_and_goes_on_by_itself(
    tmp_path: Path, signum: int, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {
        "NTASKS": "1",
        "JOB_NAME": "sae",
        "JOB_ID": "4711",
        "PROCID": "0",
        "LOCALID": "0",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", "0")
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")

    whole, root = make_module(), tmp_path / "run"
    make_trainer(tmp_path / "whole", 30, plugins=[SLURMEnvironment()]).fit(whole, loader())
    trainer = make_trainer(root, 30, plugins=[SLURMEnvironment()], callbacks=[Signals(12, signum)])
    with pytest.raises(Interrupted) as raised:
        trainer.fit(make_module(), loader())
    assert raised.value.code == 75
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == (
        "requeue 4711\n" if signum == signal.SIGUSR1 else ""
    )

    resumed = make_module()  # the same command again, without a checkpoint's path
    trainer = make_trainer(root, 30, plugins=[SLURMEnvironment()])
    trainer.fit(resumed, loader(start=13), weights_only=True)
    assert_same_state(whole, resumed)


def test_slurm_checkpoints_are_numbered_on(tmp_path: Path):
    assert next_slurm_checkpoint(tmp_path).name == "hpc_ckpt_1.ckpt"
    for name in ("hpc_ckpt_9.ckpt", "hpc_ckpt_10.ckpt", ".hpc_ckpt_11.ckpt.7.tmp"):
        (tmp_path / name).touch()
    assert next_slurm_checkpoint(tmp_path).name == "hpc_ckpt_11.ckpt"


STUCK = """
import signal, sys, time
import lightning.pytorch as pl
from aen_lightning.training.module import SAEModule
from tests.support.streams import loader
from tests.support.training import SAE_FIELDS, make_trainer

class Stuck(pl.Callback):
    def on_train_batch_start(self, *args):
        print("here", flush=True)
        while True:
            time.sleep(0.1)

make_trainer(sys.argv[1], 5, callbacks=[Stuck()]).fit(SAEModule(SAE_FIELDS), loader())
"""


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(tmp_path: Path):
    process: Any = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)  # a repetition within a second is the same signal, passed on
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM  # 143 to a shell
