"""Reports, and reading the page they are written to."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from aen_lightning.callbacks import DeadFeatureTracker
from aen_lightning.report import collect, make_figures, render_report

HOOK, CONTEXT, D_SAE = "blocks.1.hook_resid_post", 8, 24
GRID: list[dict[str, Any]] = [
    {"architecture": "aen", "d_in": 8, "d_sae": 24, "l1_coefficient": [0.02, 0.2], "l2_coefficient": 0.001,
     "ema_decay": 0.9, "warmup_delay_steps": 5, "warmup_ramp_steps": 10},
    {"architecture": "aen", "d_in": 8, "d_sae": 24, "l1_coefficient": 0.1, "l2_coefficient": 0.0, "gamma": 0.0},
    {"architecture": "topk", "d_in": 8, "d_sae": 24, "k": [2, 4]},
]  # fmt: skip


def make_run_trainer(root: Path, **kwargs: Any) -> pl.Trainer:
    """A Trainer for 40 steps that leaves a run of Lightning's CSVLogger in ``root/version_0``."""
    return pl.Trainer(
        accelerator="cpu", devices=1, max_steps=40, log_every_n_steps=4, val_check_interval=20,
        logger=CSVLogger(str(root), name=""), enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=root, callbacks=[ModelCheckpoint(save_last=True), DeadFeatureTracker(window_steps=10)],
        **kwargs,
    )  # fmt: skip


class Page(HTMLParser):
    """Checks that elements nest, and gathers them, what a browser would fetch, the scripts' data and the
    text.
    """

    VOID = ("meta", "link", "br", "img", "input", "col", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.elements: list[tuple[str, tuple[str, ...]]] = []  # names of elements and of their attributes
        self.fetched: list[str] = []
        self.data: dict[str, str] = {}
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.policy, self.text, self._id, self._type = "", "", "", ""
        self.feed(html)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.elements.append((tag, tuple(values)))
        self.fetched += [str(values[k]) for k in ("src", "href", "data", "poster", "srcset") if values.get(k)]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(values["content"])
        self._id, self._type = str(values.get("id", "")), str(values.get("type", ""))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] == ["script"]:
            self.data[self._id] = data
            if not self._type:
                self.scripts.append(data)
        elif self.stack[-1:] == ["style"]:
            self.styles.append(data)
        else:
            self.text += data

    def traces(self, figure: str) -> list[dict[str, Any]]:
        """The traces of a figure, by its id."""
        (found,) = [f for f in json.loads(self.data["figure-data"]) if f["id"] == figure]
        return list(found["figure"]["data"])


def written(runs: list[Path], **kwargs: Any) -> Page:
    """The page about some runs."""
    report = collect(runs)
    return Page(render_report(report, make_figures(report), **kwargs))
