"""Held-out activations to evaluate on: a language model on text, shards on disk, or synthetic samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aen_lightning.data.synthetic import SpikedDataModule
from aen_lightning.data.text import TextActivationsDataModule
from aen_lightning.language_model.hook_points import Hook
from aen_lightning.progress import working
from aen_lightning.shards import open_activations

SYNTHETIC_STREAM = 2**31 + 1
"""The test stream of ``SpikedDataModule``, which training never draws from."""


@dataclass(frozen=True)
class InputBatch:
    """Raw activations in units that are close to independent of each other.

    Args:
        x: Shape (units, tokens, d_in), float32, unscaled.
        keep: Shape (units, tokens), bool: tokens that count; the others are special tokens, outliers or
            padding.
        first_unit: Number of the first unit.
    """

    x: Tensor
    keep: Tensor
    first_unit: int


class Inputs(ABC):
    """Iterable over batches of activations, the same each time.

    Attributes:
        n_units: Units in all: context rows, or runs of tokens.
        d_in: Width of the activations.
    """

    n_units: int
    d_in: int

    @abstractmethod
    def __iter__(self) -> Iterator[InputBatch]: ...

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The section ``data`` of the JSON."""

    def counted(self, what: str) -> Iterator[InputBatch]:
        """The batches, while the rows of those that are done with are counted as progress of ``what``."""
        with working(what, self.n_units, "rows") as task:
            for batch in self:
                yield batch
                task.done += len(batch.x)

    def tokens(self, n_tokens: int) -> Tensor:
        """The first ``n_tokens`` kept rows, (n, d_in); fewer if there are fewer."""
        found: list[Tensor] = []
        for batch in self:
            found.append(batch.x[batch.keep])
            if sum(map(len, found)) >= n_tokens:
                break
        return torch.cat(found)[:n_tokens]


class TextInputs(Inputs):
    """Activations of a language model at one hook point, on packed rows of held-out documents.

    Args:
        data: A data module for one hook point; its held-out documents are read, its scaling is not applied.
        split: ``test`` (odd held-out documents) or ``validation`` (even ones).
        n_rows: Most rows to take; None: all.
        batch_size_prompts: Rows a model call.
        lm: The whole language model, LM head included, if downstream metrics are wanted.

    Raises:
        ValueError: If the held-out documents give no row, or there are several hook points.
    """

    def __init__(
        self,
        data: TextActivationsDataModule,
        *,
        split: str = "test",
        n_rows: int | None = None,
        batch_size_prompts: int = 16,
        lm: Any = None,
    ) -> None:
        data.setup()
        if isinstance(data.d_in, dict):
            raise ValueError(f"evaluation takes one hook point at a time, got {', '.join(data.d_in)}")
        rows = data.held_out_rows(split)[:n_rows]
        if not rows:
            raise ValueError(
                f"the {split} documents give no row of {data.options.context_size} tokens: hold out more "
                f"documents ({data.options.held_out_documents} now) or lower context_size"
            )
        self.data, self.split, self.batch_size_prompts, self.lm = data, split, batch_size_prompts, lm
        self.rows = torch.stack(rows)
        self.hook: Hook = data.hooks[0]
        self.d_in = data.d_in
        self.n_units = len(self.rows)

    def keep(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Which tokens (rows, context) count, given raw activations (rows, context, d_in), as in training."""
        keep = self.data.token_filter.by_id(tokens.to(x.device))
        usual = self.data.token_filter.by_norm([x[keep]])
        return keep if usual is None else keep.masked_scatter(keep, usual)

    def __iter__(self) -> Iterator[InputBatch]:
        model, first = self.data.language_model, 0
        for tokens in self.rows.split(self.batch_size_prompts):
            x = model.activations(tokens)[self.hook.hook_name].float()
            yield InputBatch(x, self.keep(tokens, x), first)
            first += len(tokens)

    def describe(self) -> dict[str, Any]:
        """Kind, model, hook point, dataset, split, rows, and which tokens are left out."""
        metadata = self.data.sae_metadata
        keys = (
            "model_name", "revision", "hook_name", "dataset_path", "dataset_name", "dataset_split",
            "context_size",
            "prepend_bos", "sequence_separator_token", "norm_outlier_multiple",
        )  # fmt: skip
        return {
            "kind": "text",
            "split": self.split,
            "n_rows": self.n_units,
            "held_out_documents": self.data.options.held_out_documents,
            "excluded_token_ids": list(self.data.token_filter.token_ids),
            **{key: metadata.get(key) for key in keys},
        }


class ShardInputs(Inputs):
    """Activations at the end of a set on disk, which training leaves out.

    Args:
        path: Folder of shards, or of a dataset that SAELens cached.
        hook_name: Which hook point; None: the only one.
        held_out_fraction: Share of the rows, at the end; 1 takes all.
        exclude_token_ids: Rows of these tokens do not count.
        tokens_per_unit: Length of the runs of rows that standard errors take as units; None: the context
            size, or 128.
        n_tokens: Most rows to take; None: all.

    Raises:
        ValueError: For a hook point that is not there, or too few rows.
    """

    def __init__(
        self,
        path: str,
        hook_name: str | None = None,
        *,
        held_out_fraction: float = 0.01,
        exclude_token_ids: Sequence[int] = (),
        tokens_per_unit: int | None = None,
        n_tokens: int | None = None,
    ) -> None:
        if not 0 < held_out_fraction <= 1:
            raise ValueError(f"held_out_fraction must be in (0, 1], got {held_out_fraction}")
        self.source = open_activations(path)
        if hook_name is None and len(self.source.d_in) > 1:
            raise ValueError(f"{path} holds several hook points, {', '.join(self.source.d_in)}: say which")
        self.hook_name = hook_name or next(iter(self.source.d_in))
        if self.hook_name not in self.source.d_in:
            raise ValueError(
                f"{path} has no activations of {hook_name!r}; it has {', '.join(self.source.d_in)}"
            )
        self.d_in = self.source.d_in[self.hook_name]
        self.unit = tokens_per_unit or self.source.context_size or 128
        n = self.source.n_tokens
        n_rows = int(n * held_out_fraction)
        self.start = n - n_rows
        self.n_rows = n_rows if n_tokens is None else min(n_tokens, n_rows)
        self.unit = max(1, min(self.unit, self.n_rows))
        self.n_units = -(-self.n_rows // self.unit)
        if self.n_rows == 0:
            raise ValueError(
                f"{path} has {n} rows, and {held_out_fraction} of them is none: raise held_out_fraction"
            )
        ids = self.source.token_ids() if exclude_token_ids else None
        if exclude_token_ids and ids is None:
            raise ValueError(f"{path} has no token ids, so none can be excluded")
        self.excluded = list(exclude_token_ids)
        self._keep = (
            torch.ones(n, dtype=torch.bool) if ids is None else ~torch.isin(ids, torch.tensor(self.excluded))
        )

    def __iter__(self) -> Iterator[InputBatch]:
        units = max(1, 4096 // self.unit)
        for first in range(0, self.n_units, units):
            begin = self.start + first * self.unit
            end = min(self.start + self.n_rows, begin + units * self.unit)
            x = self.source.gather(np.arange(begin, end), [self.hook_name])[self.hook_name]
            keep, missing = self._keep[begin:end], -(end - begin) % self.unit
            x = torch.nn.functional.pad(
                x, (0, 0, 0, missing), value=1.0
            )  # a zero row has no direction to scale
            keep = torch.nn.functional.pad(keep, (0, missing))
            yield InputBatch(x.unflatten(0, (-1, self.unit)), keep.unflatten(0, (-1, self.unit)), first)

    def describe(self) -> dict[str, Any]:
        """Kind, folder, hook point, rows, where they are from."""
        metadata = self.source.metadata
        return {
            "kind": "shards",
            "path": str(self.source.path),
            "hook_name": self.hook_name,
            "n_rows": self.n_rows,
            "first_row": self.start,
            "excluded_token_ids": self.excluded,
            **{key: metadata.get(key) for key in ("model_name", "dataset_path")},
        }


class SyntheticInputs(Inputs):
    """Fresh samples of the spiked distribution, with their true codes.

    Args:
        data: The distribution.
        n_samples: How many.
        n_units: Groups of samples for standard errors.
    """

    def __init__(self, data: SpikedDataModule, *, n_samples: int = 8192, n_units: int = 64) -> None:
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {n_samples}")
        self.data, self.d_in = data, data.d_in
        self.n_units = min(n_units, n_samples)
        self.per_unit = n_samples // self.n_units
        # unscaled: the dictionary does its own scaling, as on real activations
        unscaled = SpikedDataModule(**{**data.parameters, "input_scaling": "none"})
        self.x, self.true_acts = unscaled.sample(
            self.n_units * self.per_unit, stream=SYNTHETIC_STREAM, index=0
        )

    def __iter__(self) -> Iterator[InputBatch]:
        x = self.x.unflatten(0, (self.n_units, self.per_unit))
        yield InputBatch(x, torch.ones(x.shape[:2], dtype=torch.bool), 0)

    def describe(self) -> dict[str, Any]:
        """Kind and the parameters of the distribution."""
        return {"kind": "synthetic", "n_rows": len(self.x), "spiked": self.data.parameters}
