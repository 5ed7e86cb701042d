"""Activations of a language model that runs while the SAE trains, from a dataset of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from sae_lens.pretokenize_runner import get_special_token_from_cfg
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.util import get_special_token_ids
from torch import Tensor
from torch.utils.data import DataLoader

from aen_lightning.data.documents import TokenRows, find_column, open_dataset
from aen_lightning.data.mixing import ActivationReader, Batch, MixingBuffer, batch_loader, in_calls, shuffled_batches
from aen_lightning.data.text_options import RELEVANT_TO_ORDER, check_text_options
from aen_lightning.language_model.cut_model import ActivationModel, Hook, ModelDtype
from aen_lightning.language_model.source import LanguageModelSource, ModelClassName
from aen_lightning.saes.input_scaling import InputScaling, ScalingKind


class TextActivationsDataModule(pl.LightningDataModule):
    """An endless stream of shuffled activations of a language model on text, and fixed held-out batches.

    Training batches are tensors (train_batch_size_tokens, d_in), float32, scaled; for a *list* of hooks a dict of them,
    rows aligned. Every rank reads other documents and makes as many model calls as the others. Validation and test read
    half of the held-out documents each, a batch a model call, so their sizes vary with the tokens left out.

    A run that is resumed from a checkpoint continues exactly where it stopped: the order of tokens is replayed up to
    there (tokenising, without the model), then only what the shuffle buffer held is computed again. With
    ``norm_outlier_multiple`` the replay needs the model, and takes as long as the first time. With other settings or
    another number of ranks the replay gives another order; this is said in a warning.

    Args:
        model_name: Hub name or folder of the language model; for TransformerLens classes, the name it has there.
        hook_name: Where activations are taken, see ``aen_lightning.language_model.cut_model.resolve_hook``; or a list of such names.
        dataset_path: Hub name, folder, file, glob, or list of files: see ``aen_lightning.data.documents.open_dataset``.
        dataset_name: Subset of a Hub dataset.
        dataset_split: Split to read.
        streaming: Read the dataset as the run goes.
        text_column: Column with text or token ids; None finds it.
        model_class_name: ``AutoModelForCausalLM`` (cut after the deepest hook), or a TransformerLens class.
        revision: Of the model on the Hub.
        model_from_pretrained_kwargs: Passed on when the model is loaded (``device_map``, ``quantization_config``, ...).
        model_dtype: Of the language model.
        autocast_lm: Run it under bfloat16 autocast.
        device: Of the language model and the shuffle buffer; None: where the trainer puts the SAE.
        tokenizer_name: None: the model's own.
        context_size: Tokens a row.
        prepend_bos: Begin every row with BOS.
        sequence_separator_token: Between documents: ``bos``, ``eos``, ``sep``, a token id, or None.
        store_batch_size_prompts: Rows a model call.
        train_batch_size_tokens: Tokens a training batch, on each rank.
        buffer_size_tokens: Tokens that set off shuffling; None: the larger of 8 training batches and 2 model calls.
        activations_mixing_fraction: Share of the buffer kept for the next round, in [0, 1]; 0: no shuffling.
        exclude_special_tokens: Leave out activations at BOS, EOS, PAD and SEP tokens.
        exclude_token_ids: Leave out activations at these tokens, too.
        norm_outlier_multiple: Leave out tokens whose norm is above this multiple of the median norm in their model call
            (attention sinks), at any of the hooks; None: none.
        input_scaling: ``none``; ``per_token``: each row to norm sqrt(d_in); ``average``: all rows by one factor, which
            makes the mean norm sqrt(d_in).
        n_batches_for_norm_estimate: Model calls on the beginning of the dataset for that factor; training loses none.
        held_out_documents: The first so many documents are kept from training; 0: no validation and no test.
        n_eval_batches: Most batches a rank in validation and in testing; None: all.
        shuffle_documents: Take documents in a new random order each epoch.
        document_shuffle_buffer: Documents in the shuffle buffer of a streamed dataset.
        seed: Of both shuffles.
        prefetch: Training batches made ahead in a thread.
        stream_retries: Failures in a row that reading the dataset survives.
        stream_backoff_seconds: Wait after the first of them, then doubled.
        model: In Python, a loaded model instead of ``model_name``: a transformers or TransformerLens model, or any
            ``aen_lightning.language_model.cut_model.ActivationModel``.
        tokenizer: In Python, a tokenizer.
        dataset: In Python, a ``datasets`` dataset instead of ``dataset_path``.

    Raises:
        ValueError: On construction for values out of range; in ``setup`` for what does not fit the model or the data.
    """

    def __init__(
        self,
        model_name: str | None = None,
        hook_name: str | list[str] = "",
        dataset_path: str | list[str] | None = None,
        dataset_name: str | None = None,
        dataset_split: str = "train",
        streaming: bool = False,
        text_column: str | None = None,
        model_class_name: ModelClassName = "AutoModelForCausalLM",
        revision: str | None = None,
        model_from_pretrained_kwargs: dict[str, Any] | None = None,
        model_dtype: ModelDtype = "float32",
        autocast_lm: bool = False,
        device: str | None = None,
        tokenizer_name: str | None = None,
        context_size: int = 128,
        prepend_bos: bool = False,
        sequence_separator_token: int | Literal["bos", "eos", "sep"] | None = "eos",
        store_batch_size_prompts: int = 32,
        train_batch_size_tokens: int = 4096,
        buffer_size_tokens: int | None = None,
        activations_mixing_fraction: float = 0.5,
        exclude_special_tokens: bool = True,
        exclude_token_ids: Sequence[int] = (),
        norm_outlier_multiple: float | None = None,
        input_scaling: ScalingKind = "none",
        n_batches_for_norm_estimate: int = 16,
        held_out_documents: int = 512,
        n_eval_batches: int | None = None,
        shuffle_documents: bool = True,
        document_shuffle_buffer: int = 1000,
        seed: int = 0,
        prefetch: int = 0,
        stream_retries: int = 5,
        stream_backoff_seconds: float = 2.0,
        model: Any = None,
        tokenizer: Any = None,
        dataset: Any = None,
    ) -> None:
        super().__init__()
        objects = ("self", "__class__", "model", "tokenizer", "dataset")
        self.options = {k: v for k, v in locals().items() if k not in (*objects, "objects")}
        self.model_name, self.hook_name, self.revision = model_name, hook_name, revision
        self.model_class_name, self.model_dtype, self.autocast_lm = model_class_name, model_dtype, autocast_lm
        self.model_from_pretrained_kwargs = dict(model_from_pretrained_kwargs or {})
        self.context_size = context_size
        self.prompts, self.batch_size, self.mix_fraction = (
            store_batch_size_prompts, train_batch_size_tokens, activations_mixing_fraction,
        )  # fmt: skip
        self.buffer_size = buffer_size_tokens or max(
            8 * train_batch_size_tokens, 2 * store_batch_size_prompts * context_size
        )
        self.norm_outlier_multiple, self.scaling_kind, self.seed = norm_outlier_multiple, input_scaling, seed
        self.prefetch = prefetch
        self.given_model, self.dataset = model, dataset
        names = [n for n in ([hook_name] if isinstance(hook_name, str) else hook_name) if n]
        check_text_options(
            self.options,
            names,
            buffer_size=self.buffer_size,
            has_model=model is not None,
            has_dataset=dataset is not None,
        )
        self.source = LanguageModelSource(
            model_name, names, model_class_name=model_class_name, revision=revision,
            model_from_pretrained_kwargs=self.model_from_pretrained_kwargs, model_dtype=model_dtype,
            tokenizer_name=tokenizer_name, device=self._lm_device, model=model, tokenizer=tokenizer,
        )  # fmt: skip
        self._rows: TokenRows | None = None
        self._scaling: dict[str, InputScaling] | None = None
        self._excluded = torch.empty(0, dtype=torch.long)
        self._reader: ActivationReader | None = None
        self._stream: Iterator[Batch] | None = None
        # training batches handed out, and taken by the trainer, which fetches one ahead
        self._yielded = self._trained = 0

    # --- set-up ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Check hook, tokenizer, context and dataset, from the model's config (a TransformerLens model is loaded)."""
        if self._rows is not None:
            return
        tokenizer = self.source.tokenizer()
        self.source.check_context_size(self.context_size)
        if self.dataset is None:
            self.dataset = open_dataset(
                self.options["dataset_path"], name=self.options["dataset_name"], split=self.options["dataset_split"],
                streaming=self.options["streaming"],
            )  # fmt: skip
        row = next(iter(self.dataset), None)
        if row is None:
            raise ValueError(f"the dataset {self.options['dataset_path']!r} has no rows")
        column, pretokenized = find_column(row, self.options["text_column"])
        separator = begin = None
        if not pretokenized:
            if tokenizer is None:
                raise ValueError(f"the model has no tokenizer to read {column!r} with: give tokenizer_name")
            separator = self._special_token(tokenizer, "sequence_separator_token")
            begin = get_special_token_from_cfg("bos", tokenizer) if self.options["prepend_bos"] else None
            if self.options["prepend_bos"] and begin is None:
                raise ValueError("prepend_bos is set, but the tokenizer has no BOS token: set prepend_bos to false")
        special = get_special_token_ids(tokenizer) if self.options["exclude_special_tokens"] and tokenizer else []
        self._excluded = torch.tensor(sorted({*special, *self.options["exclude_token_ids"]}), dtype=torch.long)
        rank, world_size = self._rank_and_world_size()
        self._rows = TokenRows(
            self.dataset, column=column, pretokenized=pretokenized, tokenizer=tokenizer, context_size=self.context_size,
            begin_batch_token_id=begin, separator_token_id=separator,
            held_out_documents=self.options["held_out_documents"], shuffle=self.options["shuffle_documents"],
            shuffle_buffer=self.options["document_shuffle_buffer"], seed=self.seed, rank=rank, world_size=world_size,
            retries=self.options["stream_retries"], backoff_seconds=self.options["stream_backoff_seconds"],
        )  # fmt: skip

    def _special_token(self, tokenizer: Any, option: str) -> int | None:
        choice = self.options[option]
        token = get_special_token_from_cfg(choice, tokenizer)
        if choice is not None and token is None:
            raise ValueError(f"{option} is {choice!r}, but the tokenizer has no such token: give a token id or null")
        return token

    def _lm_device(self) -> str:
        where_the_sae_is = "cpu" if self.trainer is None else str(self.trainer.strategy.root_device)
        return self.options["device"] or where_the_sae_is

    def _rank_and_world_size(self) -> tuple[int, int]:
        kwargs = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)

    # --- what it says of itself -----------------------------------------------------------------------------------

    @property
    def hooks(self) -> tuple[Hook, ...]:
        """The hooks, found in the model's config; batches of several are keyed by their ``hook_name``."""
        return self.source.hooks

    @property
    def d_in(self) -> int | dict[str, int]:
        """Width of the activations; for a list of hooks a dict."""
        widths = {h.hook_name: h.d_in for h in self.hooks}
        return widths if isinstance(self.hook_name, list) else next(iter(widths.values()))

    @property
    def input_scaling(self) -> InputScaling | dict[str, InputScaling]:
        """The scaling applied to each batch; for a list of hooks a dict. ``average`` runs the model to find it."""
        scaling = self._scalings()
        return dict(scaling) if isinstance(self.hook_name, list) else next(iter(scaling.values()))

    @property
    def token_counts(self) -> dict[str, int]:
        """Tokens of this rank so far: ``seen`` by the model in training, ``dropped_special``, ``dropped_outliers``, and
        ``trained_on``. What is in the shuffle buffer is seen and not yet trained on."""
        return self.reader.counts | {"trained_on": self._trained * self.batch_size}

    @property
    def sae_metadata(self) -> dict[str, Any]:
        """What an SAE trained on this should say about its input, in SAELens's metadata keys."""
        o = self.options
        excluded = self._excluded.tolist() if o["exclude_token_ids"] else o["exclude_special_tokens"]
        metadata = self.source.metadata() | {
            "dataset_path": o["dataset_path"],
            "dataset_name": o["dataset_name"],
            "dataset_split": o["dataset_split"],
            "context_size": self.context_size,
            "prepend_bos": o["prepend_bos"],
            "sequence_separator_token": o["sequence_separator_token"],
            "exclude_special_tokens": excluded,
            "norm_outlier_multiple": self.norm_outlier_multiple,
            "held_out_documents": o["held_out_documents"],
            "disable_concat_sequences": False,
            "seqpos_slice": (None,),
        }
        if isinstance(self.hook_name, list):  # of a member, the sweep says the rest
            metadata["hook_name"] = [h.hook_name for h in self.hooks]
            for one in ("hf_hook_name", "reshape_activations"):
                metadata.pop(one, None)
        return metadata

    # --- activations ----------------------------------------------------------------------------------------------

    @property
    def language_model(self) -> ActivationModel:
        """The frozen language model, loaded when first asked for."""
        return self.source.model

    @property
    def reader(self) -> ActivationReader:
        """Reads the language model and filters tokens."""
        if self._reader is None:
            self._require_rows()  # before setup the tokens to exclude are not known
            self._reader = ActivationReader(
                lambda: self.language_model, self.hooks, excluded=self._excluded,
                norm_outlier_multiple=self.norm_outlier_multiple, autocast=self.autocast_lm,
            )  # fmt: skip
        return self._reader

    def _scale(self, rows: Tensor) -> Batch:
        scaling = self._scalings()
        parts = rows.split([h.d_in for h in self.hooks], dim=-1)
        batch = {h.hook_name: scaling[h.hook_name](x) for h, x in zip(self.hooks, parts, strict=True)}
        return batch if isinstance(self.hook_name, list) else batch[self.hooks[0].hook_name]

    def _scalings(self) -> dict[str, InputScaling]:
        if self._scaling is None:
            if self.scaling_kind == "average":
                self._scaling = self._average_scalings()
            else:
                self._scaling = {h.hook_name: InputScaling(self.scaling_kind) for h in self.hooks}
        return self._scaling

    def _average_scalings(self) -> dict[str, InputScaling]:
        # the same rows on every rank, in an iterator of their own: ranks agree without talking, and training loses none
        calls = in_calls(self._require_rows().first(), self.prompts)
        means = self.reader.mean_norms(islice(calls, self.options["n_batches_for_norm_estimate"]))
        return {
            h.hook_name: InputScaling("average", math.sqrt(h.d_in) / mean)
            for h, mean in zip(self.hooks, means, strict=True)
        }

    # --- training -------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless training batches; started again, it goes on where it stood."""
        return batch_loader(self._training_batches)

    def _training_batches(self) -> Iterator[Batch]:
        if self._stream is None:
            rank, _ = self._rank_and_world_size()
            generator = torch.Generator().manual_seed((self.seed << 20) + rank)
            buffer = MixingBuffer(self.buffer_size, self.batch_size, self.mix_fraction, generator)
            calls = in_calls(self._require_rows().training(), self.prompts)
            stream = map(self._scale, shuffled_batches(self.reader, calls, buffer, skip=self._yielded))
            self._stream = PrefetchingIterator(stream, self.prefetch) if self.prefetch else stream
        self._trained = self._yielded  # a batch fetched ahead by a loader that was then started again is gone
        for batch in self._stream:
            self._yielded += 1
            if self.trainer is None:
                self._trained += 1
            yield batch

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the batches that the trainer takes: it fetches one ahead, which is lost when the run stops."""
        if self.trainer is not None and self.trainer.training:
            self._trained += 1
        return batch

    # --- evaluation -----------------------------------------------------------------------------------------------

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """The held-out validation batches of this rank, the same each time."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """The held-out test batches of this rank, the same each time."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Batch] | list[Any]:
        if self.options["held_out_documents"] == 0:
            return []
        rank, world_size = self._rank_and_world_size()
        rows = self._require_rows().evaluation(split)
        if (per_rank := len(rows) // world_size) == 0:
            raise ValueError(
                f"the {split} documents give {len(rows)} rows of {self.context_size} tokens for {world_size} ranks: "
                f"raise held_out_documents ({self.options['held_out_documents']})"
            )
        # as many calls on each rank: a sharded model, and Lightning's reductions, hang otherwise
        calls = torch.stack(rows[rank::world_size][:per_rank]).split(self.prompts)[: self.options["n_eval_batches"]]
        return batch_loader(lambda: (self._scale(self.reader.read(tokens)[0]) for tokens in calls))

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream (Lightning keeps rank 0's, and all ranks are at the same) and average scaling."""
        factors = {h: s.factor for h, s in (self._scaling or {}).items()}
        return {"n_batches": self._trained, "stream": self._stream_settings(), "factors": factors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` says, once the next training loader is started."""
        settings = self._stream_settings()
        changed = [k for k, v in state_dict["stream"].items() if settings.get(k) != v]
        if changed:
            rank_zero_warn(
                f"the stream differs from the one the checkpoint was trained on in {', '.join(changed)}: it goes on "
                f"after {state_dict['n_batches']} batches of the new order, so some text may be repeated or left out"
            )
        self._close_stream()
        self._yielded = self._trained = state_dict["n_batches"]
        self._reader = None
        if state_dict["factors"] and self.scaling_kind == "average":
            self._scaling = {h: InputScaling("average", factor) for h, factor in state_dict["factors"].items()}

    def _stream_settings(self) -> dict[str, Any]:
        settings = {k: self.options[k] for k in RELEVANT_TO_ORDER}
        settings["exclude_token_ids"] = list(self.options["exclude_token_ids"])
        return settings | {"buffer_size_tokens": self.buffer_size, "world_size": self._rank_and_world_size()[1]}

    def held_out_rows(self, split: str) -> list[Tensor]:
        """Token rows (context_size,) of a held-out split, ``val`` or ``test``: the same every time, on every rank.

        Raises:
            RuntimeError: Before ``setup``.
        """
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
