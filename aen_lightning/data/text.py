"""Activations of a language model that runs while the SAE trains, from a dataset of text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from sae_lens.training.prefetch import PrefetchingIterator
from torch import Tensor
from torch.utils.data import DataLoader

from aen_lightning.data.mixing import (
    ActivationReader,
    Batch,
    MixingBuffer,
    batch_loader,
    in_calls,
    shuffled_batches,
)
from aen_lightning.data.options import TextOptions, refuse_unknown
from aen_lightning.data.ranks import rank_and_world_size, ranks_of_same_batch
from aen_lightning.data.token_filter import TokenFilter
from aen_lightning.data.token_rows import TokenRows
from aen_lightning.language_model.cut_model import ActivationModel
from aen_lightning.language_model.hook_points import Hook
from aen_lightning.language_model.source import LanguageModelSource
from aen_lightning.language_model.split_rows import SplitRows
from aen_lightning.saes.input_scaling import InputScaling


class TextActivationsDataModule(pl.LightningDataModule):
    """An endless stream of shuffled activations of a language model on text, and fixed held-out batches.

    Training batches are tensors (train_batch_size_tokens, d_in), float32, scaled; for a *list* of hook points
    a dict of them, rows aligned. Every rank reads other documents and makes as many model calls as the
    others. Ranks that need the same batches (sharded features) read the same documents, and each runs the model
    on its share of the rows of a call. Validation and test read half of the held-out documents each, a batch a model call, so their sizes
    vary with the tokens left out.

    A run that is resumed from a checkpoint continues exactly where it stopped: the order of tokens is
    replayed up to there (tokenising, without the model), then only what the shuffle buffer held is computed
    again. With ``norm_outlier_multiple`` the replay needs the model, and takes as long as the first time.
    With other settings or another number of ranks the replay gives another order; this is said in a warning.

    Args:
        model: In Python, a loaded model instead of ``model_name``: a transformers or TransformerLens model,
            or any ``aen_lightning.language_model.cut_model.ActivationModel``.
        tokenizer: In Python, a tokenizer.
        dataset: In Python, a ``datasets`` dataset instead of ``dataset_path``.
        **options: The fields of ``aen_lightning.data.options.TextOptions``: ``model_name``, ``hook_name``,
            ``dataset_path``, ...

    Raises:
        TypeError: For an option that does not exist.
        ValueError: On construction for values out of range; in ``setup`` for what does not fit the model or
            the data.
    """

    def __init__(
        self, *, model: Any = None, tokenizer: Any = None, dataset: Any = None, **options: Any
    ) -> None:
        super().__init__()
        refuse_unknown(options, TextOptions, "model", "tokenizer", "dataset")
        self.options = TextOptions(**options)
        self.source = LanguageModelSource(
            self.options, self.options.hook_names, device=self._device, model=model, tokenizer=tokenizer
        )
        if dataset is None:
            self.options.require_dataset_path()
        self.dataset = dataset
        self._rows: TokenRows | None = None
        self._scaling: dict[str, InputScaling] | None = None
        self._token_filter: TokenFilter | None = None
        self._reader: ActivationReader | None = None
        self._stream: Iterator[Batch] | None = None
        # training batches handed out, and taken by the trainer, which fetches one ahead
        self._yielded = self._trained = 0

    # --- set-up ---------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Check the options against the model's config (a TransformerLens model is loaded) and the dataset."""
        if self._rows is not None:
            return
        tokenizer, options = self.source.tokenizer(), self.options
        self.source.check_context_size(options.context_size)
        if self.dataset is None:
            self.dataset = options.open_dataset()
        if options.prefetch and ranks_of_same_batch(self.trainer) is not None:
            raise ValueError(
                "prefetch must be 0 where the language model's rows are split over ranks: a thread's collectives "
                f"would mix with those of training, got {options.prefetch}"
            )
        rank, world_size = rank_and_world_size(self.trainer)
        self._rows = TokenRows.of(
            options, self.dataset, tokenizer, held_out_documents=options.held_out_documents,
            shuffle=options.shuffle_documents, shuffle_buffer=options.document_shuffle_buffer,
            seed=options.seed, rank=rank, world_size=world_size,
        )  # fmt: skip
        self._token_filter = TokenFilter(options.excluded_token_ids(tokenizer), options.norm_outlier_multiple)

    def _device(self) -> str:
        return "cpu" if self.trainer is None else str(self.trainer.strategy.root_device)

    # --- what it says of itself -----------------------------------------------------------------------------

    @property
    def hooks(self) -> tuple[Hook, ...]:
        """The hook points, found in the model's config; batches of several have their ``hook_name`` as keys."""
        return self.source.hooks

    @property
    def d_in(self) -> int | dict[str, int]:
        """Width of the activations; for a list of hook points a dict."""
        widths = {h.hook_name: h.d_in for h in self.hooks}
        return widths if isinstance(self.options.hook_name, list) else next(iter(widths.values()))

    @property
    def input_scaling(self) -> InputScaling | dict[str, InputScaling]:
        """The scaling applied to each batch; for a list of hook points a dict. ``average`` runs the model to
        find it."""
        scaling = self._scalings()
        return dict(scaling) if isinstance(self.options.hook_name, list) else next(iter(scaling.values()))

    @property
    def token_counts(self) -> dict[str, int]:
        """Tokens of this rank so far: ``seen`` by the model in training, ``dropped_special``,
        ``dropped_outliers``, and ``trained_on``. What is in the shuffle buffer is seen and not yet trained
        on."""
        return self.reader.counts | {"trained_on": self._trained * self.options.train_batch_size_tokens}

    @property
    def sae_metadata(self) -> dict[str, Any]:
        """What an SAE trained on this should say about its input, in SAELens's metadata keys."""
        o = self.options
        excluded = list(self.token_filter.token_ids) if o.exclude_token_ids else o.exclude_special_tokens
        metadata = self.source.metadata() | o.metadata() | {
            "exclude_special_tokens": excluded,
            "norm_outlier_multiple": o.norm_outlier_multiple,
            "held_out_documents": o.held_out_documents,
            "disable_concat_sequences": False,
            "seqpos_slice": (None,),
        }  # fmt: skip
        if isinstance(self.options.hook_name, list):  # of a member, the sweep says the rest
            metadata["hook_name"] = [h.hook_name for h in self.hooks]
            for one in ("hf_hook_name", "reshape_activations"):
                metadata.pop(one, None)
        return metadata

    # --- activations ----------------------------------------------------------------------------------------

    @property
    def language_model(self) -> ActivationModel:
        """The frozen language model, loaded when first asked for; its rows are split over ranks of one batch."""
        group = ranks_of_same_batch(self.trainer)
        return self.source.model if group is None else SplitRows(self.source.model, group)

    @property
    def token_filter(self) -> TokenFilter:
        """Which tokens are kept."""
        self._require_rows()  # before setup the tokens to exclude are not known
        assert self._token_filter is not None
        return self._token_filter

    @property
    def reader(self) -> ActivationReader:
        """Reads the language model and filters tokens."""
        if self._reader is None:
            self._reader = ActivationReader(
                lambda: self.language_model, self.hooks, token_filter=self.token_filter,
                autocast=self.options.autocast_lm,
            )  # fmt: skip
        return self._reader

    def _scale(self, rows: Tensor) -> Batch:
        scaling = self._scalings()
        parts = rows.split([h.d_in for h in self.hooks], dim=-1)
        batch = {h.hook_name: scaling[h.hook_name](x) for h, x in zip(self.hooks, parts, strict=True)}
        return batch if isinstance(self.options.hook_name, list) else batch[self.hooks[0].hook_name]

    def _scalings(self) -> dict[str, InputScaling]:
        if self._scaling is None:
            kind = self.options.input_scaling
            if kind == "average":
                self._scaling = self._average_scalings()
            else:
                self._scaling = {h.hook_name: InputScaling(kind) for h in self.hooks}
        return self._scaling

    def _average_scalings(self) -> dict[str, InputScaling]:
        # the same rows on every rank, in an iterator of their own: ranks agree, and training loses none
        calls = in_calls(self._require_rows().first(), self.options.store_batch_size_prompts)
        means = self.reader.mean_norms(islice(calls, self.options.n_batches_for_norm_estimate))
        return {
            h.hook_name: InputScaling("average", math.sqrt(h.d_in) / mean)
            for h, mean in zip(self.hooks, means, strict=True)
        }

    # --- training -------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless training batches; started again, it goes on where it stood."""
        return batch_loader(self._training_batches)

    def _training_batches(self) -> Iterator[Batch]:
        if self._stream is None:
            rank, _ = rank_and_world_size(self.trainer)
            o, generator = self.options, torch.Generator().manual_seed((self.options.seed << 20) + rank)
            buffer = MixingBuffer(
                o.buffer_size, o.train_batch_size_tokens, o.activations_mixing_fraction, generator
            )
            calls = in_calls(self._require_rows().training(), o.store_batch_size_prompts)
            stream = map(self._scale, shuffled_batches(self.reader, calls, buffer, skip=self._yielded))
            self._stream = PrefetchingIterator(stream, o.prefetch) if o.prefetch else stream
        self._trained = self._yielded  # a batch fetched ahead by a loader that was then started again is gone
        for batch in self._stream:
            self._yielded += 1
            if self.trainer is None:
                self._trained += 1
            yield batch

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the batches that the trainer takes: the one it fetches ahead is lost when the run stops."""
        if self.trainer is not None and self.trainer.training:
            self._trained += 1
        return batch

    # --- evaluation -----------------------------------------------------------------------------------------

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """The held-out validation batches of this rank, the same each time."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """The held-out test batches of this rank, the same each time."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Batch] | list[Any]:
        if self.options.held_out_documents == 0:
            return []
        rank, world_size = rank_and_world_size(self.trainer)
        rows = self._require_rows().evaluation(split)
        if (per_rank := len(rows) // world_size) == 0:
            raise ValueError(
                f"the {split} documents give {len(rows)} rows of {self.options.context_size} tokens for "
                f"{world_size} ranks: raise held_out_documents ({self.options.held_out_documents})"
            )
        # as many calls on each rank: a sharded model, and Lightning's reductions, hang otherwise
        calls = torch.stack(rows[rank::world_size][:per_rank]).split(self.options.store_batch_size_prompts)[
            : self.options.n_eval_batches
        ]
        return batch_loader(lambda: (self._scale(self.reader.read(tokens)[0]) for tokens in calls))

    # --- state ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Average scaling and position in the stream (Lightning keeps rank 0's; all ranks are at the same)."""
        factors = {h: s.factor for h, s in (self._scaling or {}).items()}
        return {"n_batches": self._trained, "stream": self._stream_settings(), "factors": factors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` says, once the next training loader is started."""
        settings = self._stream_settings()
        changed = [k for k, v in state_dict["stream"].items() if settings.get(k) != v]
        if changed:
            rank_zero_warn(
                f"the stream differs from the one the checkpoint was trained on in {', '.join(changed)}: it "
                f"goes on after {state_dict['n_batches']} batches of the new order, so some text may be "
                "repeated or left out"
            )
        self._close_stream()
        self._yielded = self._trained = state_dict["n_batches"]
        self._reader = None
        if state_dict["factors"] and self.options.input_scaling == "average":
            self._scaling = {h: InputScaling("average", f) for h, f in state_dict["factors"].items()}

    def _stream_settings(self) -> dict[str, Any]:
        return self.options.deciding_order() | {"world_size": rank_and_world_size(self.trainer)[1]}

    def held_out_rows(self, split: str) -> list[Tensor]:
        """After ``setup``, token rows (context_size,) held out for ``validation`` or ``test``, on every rank."""
        return self._require_rows().evaluation(split)

    def _require_rows(self) -> TokenRows:
        if self._rows is None:
            raise RuntimeError("the TextActivationsDataModule is not set up: call setup() (a Trainer does)")
        return self._rows

    def _close_stream(self) -> None:
        if isinstance(self._stream, PrefetchingIterator):
            self._stream.close()
        self._stream = None

    def teardown(self, stage: str | None = None) -> None:
        """Stop prefetching and free a model that was loaded here. A further fit goes on at the next batch."""
        self._close_stream()
        self._yielded = self._trained
        self.source.free()
