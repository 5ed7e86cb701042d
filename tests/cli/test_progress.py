"""What is seen of long work: nothing of short work, lines in a file, a bar on a terminal."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from aen_lightning.cli.main import main
from aen_lightning.cli.progress import duration, line, show
from aen_lightning.cli.run_progress import RunProgress
from aen_lightning.data.mixing import MixingBuffer, shuffled_batches
from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.progress import Task, shown
from aen_lightning.training.module import SAEModule


class Stream(io.StringIO):
    """A stream that tells when something was written to it."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal, self.written = terminal, threading.Event()

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.written.set()
        return super().write(text)


def test_a_line_says_how_far_how_long_and_how_much_longer() -> None:
    task = Task("filling", 12_000, "tokens", 3000, note="loss 0.5")
    assert line(task, 9.2) == "filling: 3,000 of 12,000 tokens (25 %), 9 s, 28 s left; loss 0.5"
    assert line(Task("going on", 100, "steps", 60, start=40), 10) == (
        "going on: 60 of 100 steps (60 %), 10 s, 20 s left"
    )
    assert line(Task("reading", None, "calls", 7), 61) == "reading: 7 calls, 1 min 01 s"
    assert line(Task("publishing"), 3.0) == "publishing: 3 s"
    assert line(Task("reading", 5, "rows"), 2.0) == "reading: 0 of 5 rows (0 %), 2 s"


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.4, 59.6, 3599, 3600, 100_000)] == [
        "0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "27 h 46 min",
    ]  # fmt: skip


def test_short_work_shows_nothing() -> None:
    for terminal in (False, True):
        stream = Stream(terminal=terminal)
        with show(Task("work", 3, "rows"), stream=stream, first_s=3600):
            pass
        assert stream.getvalue() == ""


def test_a_file_gets_whole_lines() -> None:
    stream = Stream(terminal=False)
    with show(Task("work", 4, "rows", 1), stream=stream, first_s=0.001, every_s=3600):
        assert stream.written.wait(30)
    assert stream.getvalue() == "work: 1 of 4 rows (25 %), 0 s, 0 s left\n"


def test_a_terminal_gets_a_bar_that_is_gone_afterwards() -> None:
    stream = Stream(terminal=True)
    with show(Task("work", 4, "rows", 1, note="l0 3"), stream=stream, first_s=0.001, every_s=0.001):
        while "l0 3" not in stream.getvalue():
            assert stream.written.wait(30)
            stream.written.clear()
    shows = stream.getvalue().split("\r")
    assert any("work" in text and "1/4" in text for text in shows)
    assert shows[-1].strip() == ""


def test_work_that_counts_nothing_shows_its_time_only() -> None:
    stream = Stream(terminal=True)
    with show(Task("loading"), stream=stream, first_s=0.001, every_s=0.001):
        while "loading: 00:" not in stream.getvalue():
            assert stream.written.wait(30)
            stream.written.clear()
    assert "?" not in stream.getvalue()


class Shown:
    """Every task that was shown, as it was at its end."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def __call__(self, task: Task) -> Any:
        self.tasks.append(task)
        return _Nothing()


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def trainer(folder: Path, **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False,
        log_every_n_steps=1, callbacks=[RunProgress()], default_root_dir=folder, **kwargs,
    )  # fmt: skip


def test_a_run_is_shown_with_its_steps_and_metrics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = SpikedDataModule(d_in=8, n_features=16, k=2, train_batch_size_tokens=16, n_eval_samples=32)
    module = SAEModule({"architecture": "aen", "d_in": 8, "d_sae": 16})
    seen = Shown()
    with shown(seen):
        trainer(tmp_path, max_steps=3).fit(module, datamodule=data)
        trainer(tmp_path).validate(module, datamodule=data, verbose=False)
        trainer(tmp_path).test(module, datamodule=data, verbose=False)
    training, validating, testing = seen.tasks
    assert (training.what, training.done, training.total, training.unit) == ("training", 3, 3, "steps")
    assert "loss " in training.note
    assert "dead% 0" in training.note
    for task, what in ((validating, "validating"), (testing, "testing")):
        assert (task.what, task.done, task.total) == (what, 2, 2)


def test_filling_the_buffer_is_shown_until_the_first_batch() -> None:
    class Reader:
        token_filter = SimpleNamespace(norm_outlier_multiple=None)

        def read(self, tokens: torch.Tensor, *, count: bool) -> tuple[torch.Tensor, torch.Tensor]:
            return tokens.flatten().float().unsqueeze(-1), tokens

    open_tasks: list[Task] = []

    class Open(_Nothing):
        def __init__(self, task: Task) -> None:
            self.task = task

        def __enter__(self) -> None:
            open_tasks.append(self.task)

        def __exit__(self, *_: object) -> None:
            open_tasks.remove(self.task)

    counts = []

    def calls() -> Any:
        for i in range(8):
            counts.append([(task.done, task.total) for task in open_tasks])
            yield torch.full((2, 5), i)

    with shown(Open):
        batches = shuffled_batches(Reader(), calls(), MixingBuffer(40, 4, 0.5))  # type: ignore[arg-type]
        first = next(batches)
        assert open_tasks == []
        rest = list(batches)
    assert counts == [[(0, 40)], [(10, 40)], [(20, 40)], [(30, 40)], [], [], [], []]
    plain = list(
        shuffled_batches(
            Reader(),  # type: ignore[arg-type]
            (torch.full((2, 5), i) for i in range(8)),
            MixingBuffer(40, 4, 0.5, torch.Generator().manual_seed(0)),
        )
    )
    assert len(plain) == 1 + len(rest)
    assert first.shape == plain[0].shape == (4, 1)


@pytest.mark.parametrize("what", ["text", "nothing"])
def test_bars_of_the_users_own_choice_stay(what: str) -> None:
    from aen_lightning.cli.training import AENCLI

    args = ["--config", "debug", "--trainer.logger=false"]
    if what == "text":
        args += ["--trainer.callbacks+=TQDMProgressBar"]
    else:
        args += ["--trainer.enable_progress_bar=false"]
    cli = AENCLI(SAEModule, args, run=False)
    bars = [c for c in cli.trainer.callbacks if isinstance(c, pl.callbacks.ProgressBar)]  # type: ignore[attr-defined]
    assert [type(bar).__name__ for bar in bars] == (["TQDMProgressBar"] if what == "text" else [])


@pytest.mark.parametrize(
    ("words", "loads"),
    [
        (["shards", "info", "nowhere"], True),
        (["plan", "--config", "nowhere"], True),
        (["recipes"], False),
        (["evaluate", "a", "--n_rwos=1"], False),
    ],
)
def test_a_command_that_loads_pytorch_says_so_and_no_other_does(
    words: list[str], loads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Shown()
    monkeypatch.setattr("aen_lightning.cli.progress.show", seen)
    main(words)
    loading = [task for task in seen.tasks if task.what == "loading PyTorch, Lightning and SAELens"]
    assert len(loading) == loads
