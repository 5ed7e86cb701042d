"""Activations from disk for training: shards of ``aen harvest``, or a dataset that SAELens cached."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aen_lightning.data.options import require_at_least
from aen_lightning.data.order import ShuffledOrder
from aen_lightning.data.ranks import rank_and_world_size
from aen_lightning.device_copies import DeviceCopy, side_stream
from aen_lightning.files.redaction import without_secrets
from aen_lightning.saes.input_scaling import InputScaling, ScalingKind
from aen_lightning.shards.read import ShardSet, Verify, open_activations
from aen_lightning.shards.source import ActivationSource

Batch = Tensor | dict[str, Tensor]


class ActivationsDataModule(pl.LightningDataModule):
    """Trains on activations from disk, shuffled over the whole set, endlessly.

    What rank r reads at step s is a pure function of (seed, s, r, world size), so a resumed run continues
    exactly, and nothing about the data is in its checkpoint. Batches are float32 tensors
    (train_batch_size_tokens, d_in), scaled; for several hook points a dict of them, row by row the same
    tokens. Every rank has batches of its own; ``max_steps`` ends the run.

    Args:
        path: Folder of shards (``aen harvest``), or of a dataset that SAELens cached.
        hook_name: Which hook point; several as a list; None: the only one there is.
        train_batch_size_tokens: Rows a batch, per rank.
        input_scaling: ``none``; ``per_token``: each row to norm sqrt(d_in); ``average``: all rows by one
            factor, which makes the mean norm sqrt(d_in). See ``InputScaling``.
        n_batches_for_norm_estimate: Batches of the training order behind that factor; they are trained on
            too.
        held_out_fraction: Share of the rows, at the end of the set, for validation and test; never trained
            on, and parted from training rows by ``context_size`` rows, so that no context is on both sides.
        exclude_token_ids: Rows of these tokens are left out (what SAELens cached is unfiltered; a harvest has
            its own filters).
        seed: Of the order.
        shuffle_block_rows: See ``ShuffledOrder``.
        shuffle_window_rows: See ``ShuffledOrder``; fastest if a window's activations fit the page cache.
        prefetch: Batches read ahead by a background thread; 0: read when asked.
        verify: SHA-256 of each shard: ``once`` (until it changes), ``always``, ``never``. See ``ShardSet``.
        allow_incomplete: Train on what there is of a harvest that was cut off.

    Raises:
        ValueError: For a value that makes no sense; at ``setup`` for a hook point that is not in the set, or
            too few rows.
    """

    def __init__(
        self,
        path: str,
        hook_name: str | list[str] | None = None,
        train_batch_size_tokens: int = 4096,
        input_scaling: ScalingKind = "none",
        n_batches_for_norm_estimate: int = 64,
        held_out_fraction: float = 0.01,
        exclude_token_ids: Sequence[int] = (),
        seed: int = 0,
        shuffle_block_rows: int = 64,
        shuffle_window_rows: int = 1 << 20,
        prefetch: int = 4,
        verify: Verify = "once",
        allow_incomplete: bool = False,
    ) -> None:
        super().__init__()
        require_at_least(
            1,
            train_batch_size_tokens=train_batch_size_tokens,
            n_batches_for_norm_estimate=n_batches_for_norm_estimate,
        )
        require_at_least(0, prefetch=prefetch, seed=seed)
        if not 0 <= held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must be in [0, 1), got {held_out_fraction}")
        if input_scaling not in ("none", "per_token", "average"):
            raise ValueError(f"input_scaling must be 'none', 'per_token' or 'average', got {input_scaling!r}")
        self.path, self.hook_name = Path(path), hook_name
        self.train_batch_size_tokens, self.held_out_fraction = train_batch_size_tokens, held_out_fraction
        self.scaling_kind, self.n_batches_for_norm_estimate = input_scaling, n_batches_for_norm_estimate
        self.exclude_token_ids, self.seed, self.prefetch = tuple(exclude_token_ids), seed, prefetch
        self.shuffle_block_rows, self.shuffle_window_rows = shuffle_block_rows, shuffle_window_rows
        self.verify, self.allow_incomplete = verify, allow_incomplete
        self.source: ActivationSource | None = None
        self.hook_names: list[str] = []
        self._scaling: dict[str, InputScaling] = {}
        self._kept: NDArray[np.int64] | None = None
        self._n_train = self._n_held_out = 0

    def prepare_data(self) -> None:
        """Verify the files, on one rank of each node, before the others open them."""
        self._open(self.verify)

    def setup(self, stage: str | None = None) -> None:
        """Open the set and check the arguments against it; reads no activations but those behind an average
        scale."""
        checked_elsewhere = self.trainer is not None and self.trainer.local_rank != 0
        source = self._open("never" if checked_elsewhere else self.verify)
        if self.hook_names:
            return
        names = [self.hook_name] if isinstance(self.hook_name, str) else self.hook_name
        if names is None and len(source.d_in) > 1:
            raise ValueError(
                f"{self.path} holds several hook points, {list(source.d_in)}: say which as hook_name"
            )
        names = list(source.d_in) if names is None else list(names)
        for name in names:
            if name not in source.d_in:
                raise ValueError(
                    f"{self.path} has no activations of {name!r}; it has {', '.join(source.d_in)}"
                )
        n = source.n_tokens
        if self.exclude_token_ids:
            ids = source.token_ids()
            if ids is None:
                raise ValueError(
                    f"{self.path} has no token_ids, so exclude_token_ids cannot be applied: leave it empty"
                )
            excluded = torch.isin(ids, torch.tensor(self.exclude_token_ids, dtype=ids.dtype))
            self._kept = (~excluded).nonzero().flatten().numpy()
            n = len(self._kept)
        self._n_held_out = math.floor(n * self.held_out_fraction)
        gap = (source.context_size or 0) if self._n_held_out else 0
        self._n_train = n - self._n_held_out - gap
        if self._n_train < self.train_batch_size_tokens:
            raise ValueError(
                f"{self.path} leaves {max(self._n_train, 0)} tokens to train on (of {source.n_tokens}; held "
                f"out: {self._n_held_out} and a gap of {gap}), fewer than one batch of "
                f"train_batch_size_tokens {self.train_batch_size_tokens}"
            )
        self.hook_names = names
        self._scaling = {h: self._make_scaling(h) for h in names}

    def _open(self, verify: Verify) -> ActivationSource:
        if self.source is None:
            self.source = open_activations(self.path, allow_incomplete=self.allow_incomplete, verify=verify)
        return self.source

    def _make_scaling(self, hook_name: str) -> InputScaling:
        if self.scaling_kind != "average":
            return InputScaling(self.scaling_kind)
        # the same batches on every rank, whatever the number of ranks
        order, size = self._order(), self.train_batch_size_tokens
        n_batches = min(self.n_batches_for_norm_estimate, max(1, self._n_train // size))
        norms = [
            self._read(order.batch(step, size), [hook_name])[hook_name].norm(dim=-1).mean()
            for step in range(n_batches)
        ]
        return InputScaling("average", math.sqrt(self._d_in(hook_name)) / torch.stack(norms).mean().item())

    def _d_in(self, hook_name: str) -> int:
        assert self.source is not None
        return self.source.d_in[hook_name]

    def _order(self) -> ShuffledOrder:
        return ShuffledOrder(
            self._n_train,
            seed=self.seed,
            block_rows=self.shuffle_block_rows,
            window_rows=self.shuffle_window_rows,
        )

    def _read(self, rows: NDArray[np.int64], hook_names: Sequence[str], **how: bool) -> dict[str, Tensor]:
        assert self.source is not None
        return self.source.gather(rows if self._kept is None else self._kept[rows], hook_names, **how)

    def _start_batch(
        self, rows: NDArray[np.int64], device: torch.device, stream: torch.cuda.Stream | None
    ) -> dict[str, DeviceCopy]:
        """Send the rows to the device as they are stored; they become float32, and are scaled, there."""
        read = self._read(rows, self.hook_names, as_stored=True, pin=stream is not None)
        return {h: DeviceCopy(x, device, stream, partial(_scaled, self._scaling[h])) for h, x in read.items()}

    def _batch(self, rows: NDArray[np.int64]) -> Batch:
        return self._finish_batch(self._start_batch(rows, torch.device("cpu"), None))

    def _finish_batch(self, copies: dict[str, DeviceCopy]) -> Batch:
        tensors = {h: copy.take() for h, copy in copies.items()}
        # one hook point asked for by name is a tensor, a list of hook points a dict
        return tensors if isinstance(self.hook_name, list) else tensors[self.hook_names[0]]

    def _require_setup(self) -> None:
        if not self.hook_names:
            raise RuntimeError("the ActivationsDataModule is not set up: call setup() (a Trainer does)")

    @property
    def d_in(self) -> int | dict[str, int]:
        """Width of the activations; for a list of hook points a dict."""
        self._require_setup()
        widths = {h: self._d_in(h) for h in self.hook_names}
        return widths if isinstance(self.hook_name, list) else widths[self.hook_names[0]]

    @property
    def input_scaling(self) -> InputScaling | dict[str, InputScaling]:
        """The scaling applied to each batch; for a list of hook points a dict."""
        self._require_setup()
        return dict(self._scaling) if isinstance(self.hook_name, list) else self._scaling[self.hook_names[0]]

    @property
    def sae_metadata(self) -> dict[str, Any]:
        """What an SAE trained on this should say about its input, in SAELens's metadata keys."""
        self._require_setup()
        assert self.source is not None
        hook_name = self.hook_names if isinstance(self.hook_name, list) else self.hook_names[0]
        metadata = dict(self.source.metadata) | {
            "hook_name": hook_name,
            "context_size": self.source.context_size,
        }
        hf_names = metadata.pop("hf_hook_names", None) or {}
        if not isinstance(hook_name, list) and hf_names.get(hook_name):
            metadata["hf_hook_name"] = hf_names[hook_name]
        return dict(without_secrets(metadata))

    @property
    def token_counts(self) -> dict[str, int]:
        """Rows by fate: ``train``, ``held_out``, ``excluded``; and what the harvest counted (``read``,
        ``special``, ...)."""
        self._require_setup()
        assert self.source is not None
        counts = dict(self.source.manifest.counts) if isinstance(self.source, ShardSet) else {}
        excluded = 0 if self._kept is None else self.source.n_tokens - len(self._kept)
        return counts | {"train": self._n_train, "held_out": self._n_held_out, "excluded": excluded}

    def train_dataloader(self) -> TrainBatches:
        """Endless batches, beginning with the step that the trainer is at."""
        self._require_setup()
        return TrainBatches(self)

    def val_dataloader(self) -> HeldOutBatches:
        """The held-out rows in order, the same each time, parted between ranks; equally many batches on
        each."""
        self._require_setup()
        if not self._n_held_out:
            return HeldOutBatches(self, [])
        rank, world_size = rank_and_world_size(self.trainer)
        per_rank = self._n_held_out // world_size
        assert self.source is not None
        total = self.source.n_tokens if self._kept is None else len(self._kept)
        rows = np.arange(per_rank) + (total - self._n_held_out + rank * per_rank)
        size = self.train_batch_size_tokens
        return HeldOutBatches(self, [rows[i : i + size] for i in range(0, per_rank, size)])

    def test_dataloader(self) -> HeldOutBatches:
        """As ``val_dataloader``."""
        return self.val_dataloader()


def _scaled(scaling: InputScaling, x: Tensor) -> Tensor:
    return scaling(x.float())


class TrainBatches:
    """Iterable over the training batches of this rank. Each iterator begins where the trainer is, or at step 0.

    Batches are on the trainer's device, copied on a stream of their own as they are read ahead.
    """

    def __init__(self, data: ActivationsDataModule) -> None:
        self.data = data

    def _steps_done(self) -> int:
        """Batches the trainer has trained on, this run and those before it; restored before the first batch
        is asked for."""
        trainer = self.data.trainer
        if trainer is None:
            return 0
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        return int(progress.processed)

    def _started(self, step: int) -> Iterator[dict[str, DeviceCopy]]:
        """Batches from a step on, on their way to the device."""
        data, order = self.data, self.data._order()
        device = torch.device("cpu") if data.trainer is None else data.trainer.strategy.root_device
        stream = side_stream(device)
        rank, world_size = rank_and_world_size(data.trainer)
        while True:
            rows = order.batch(step, data.train_batch_size_tokens, rank=rank, world_size=world_size)
            yield data._start_batch(rows, device, stream)
            step += 1

    def __iter__(self) -> Iterator[Batch]:
        started = self._started(self._steps_done())
        if not self.data.prefetch:
            yield from map(self.data._finish_batch, started)
            return
        from sae_lens.training.prefetch import PrefetchingIterator

        ahead = PrefetchingIterator(started, self.data.prefetch)
        try:
            yield from map(self.data._finish_batch, ahead)
        finally:
            ahead.close()


class HeldOutBatches:
    """Finite, repeatable iterable over held-out batches; the last may be smaller."""

    def __init__(self, data: ActivationsDataModule, rows: list[NDArray[np.int64]]) -> None:
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        return (self.data._batch(rows) for rows in self.rows)
