"""From documents to rows of tokens: holding out, sharding over ranks, tokenising, packing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Self

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from sae_lens.pretokenize_runner import get_special_token_from_cfg
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aen_lightning.data.documents import HfDataset, find_column, retrying
from aen_lightning.data.options import DatasetOptions

_TOKENIZER_BATCH = 64  # documents a call of a fast tokenizer


def document_key(document: Any) -> bytes:
    """A fingerprint of a document's content, 8 bytes, the same on every machine."""
    content = document.encode() if isinstance(document, str) else repr(list(document)).encode()
    return hashlib.blake2b(content, digest_size=8).digest()


def _restartable(dataset: HfDataset) -> Callable[[int], Iterator[dict[str, Any]]]:
    def start(had: int) -> Iterator[dict[str, Any]]:
        if isinstance(dataset, Dataset):
            return iter(dataset.select(range(had, len(dataset))))
        if (
            had
        ):  # where datasets itself stands; documents in its shuffle buffer are lost with the broken iterator
            dataset.load_state_dict(dataset.state_dict())
        return iter(dataset)

    if isinstance(dataset, IterableDataset):
        dataset.state_dict()  # from here on it keeps track of its position
    return start


class TokenRows:
    """Rows of ``context_size`` tokens out of a dataset, with some documents held out.

    The first ``held_out_documents`` documents of the dataset are held out: even-numbered ones for validation,
    odd-numbered ones for testing. A training document with the very same content as one of them is left out
    as well, so shuffling, sharding and repetition cannot bring a held-out text into training.

    Args:
        dataset: Documents.
        column: Column to read.
        pretokenized: Whether it holds token ids: each document is then cut into rows of its own, as it is
            (SAELens reads such data so), a remainder shorter than a row left out. Text is tokenised without
            special tokens and packed without gaps.
        tokenizer: For text.
        context_size: Tokens a row.
        begin_batch_token_id: Put before every row of text, or None.
        separator_token_id: Put between documents of text, or None.
        held_out_documents: Number of documents held out.
        shuffle: Whether training takes documents in a new random order each epoch.
        shuffle_buffer: Documents in the shuffle buffer of a streamed dataset; another is shuffled whole.
        seed: Of the document order; the same on all ranks.
        rank: This process.
        world_size: Number of processes, which share the training documents out: of a streamed dataset by file
            if the number of files is a multiple of ``world_size``, else by content, every process reading all
            of it.
        pack: Fill rows of text across documents. False: a document is a row, cut every ``context_size``
            tokens, also of token ids, and rows are of unequal length.
        retries: Failures in a row of a streamed dataset that are borne.
        backoff_seconds: Wait after the first of them, then doubled.
    """

    def __init__(
        self, dataset: HfDataset, *, column: str, pretokenized: bool,
        tokenizer: PreTrainedTokenizerBase | None,
        context_size: int, begin_batch_token_id: int | None = None, separator_token_id: int | None = None,
        held_out_documents: int = 0, shuffle: bool = True, shuffle_buffer: int = 1000, seed: int = 0,
        rank: int = 0,
        world_size: int = 1, pack: bool = True, retries: int = 5, backoff_seconds: float = 2.0,
    ) -> None:  # fmt: skip
        self.dataset = dataset.select_columns([column])
        self.column, self.pretokenized, self.tokenizer = column, pretokenized, tokenizer
        self.context_size = context_size
        self.begin_batch_token_id, self.separator_token_id = begin_batch_token_id, separator_token_id
        self.held_out_documents = held_out_documents
        self.shuffle, self.shuffle_buffer, self.seed = shuffle, shuffle_buffer, seed
        self.rank, self.world_size, self.pack = rank, world_size, pack
        self.retries, self.backoff_seconds = retries, backoff_seconds
        self.epoch = 0
        self.documents_left_out = 0
        self._held_out: list[Any] | None = None

    @classmethod
    def of(
        cls,
        options: DatasetOptions,
        dataset: HfDataset,
        tokenizer: PreTrainedTokenizerBase | None,
        **more: Any,
    ) -> Self:
        """Rows as the options say.

        Args:
            options: Name the column, tokens between documents and the rest.
            dataset: The documents.
            tokenizer: None if they are token ids.
            more: Further arguments of the class.

        Raises:
            ValueError: If the dataset is empty or has no such column, or the tokenizer is missing or has no
                such token.
        """
        patience: dict[str, Any] = {
            "retries": options.stream_retries,
            "backoff_seconds": options.stream_backoff_seconds,
        }
        first = next(retrying(lambda _: iter(dataset), what="the dataset", **patience), None)
        if first is None:
            raise ValueError(f"the dataset {options.dataset_path!r} has no rows")
        column, pretokenized = find_column(first, options.text_column)
        if tokenizer is None and not pretokenized:
            raise ValueError(f"the model has no tokenizer to read {column!r} with: give tokenizer_name")
        begin = separator = None
        if options.prepend_bos and not (pretokenized and more.get("pack", True)):
            begin = get_special_token_from_cfg("bos", tokenizer)
            if begin is None:
                raise ValueError(
                    "prepend_bos is set, but the tokenizer has no BOS token: set prepend_bos to false"
                )
        if options.sequence_separator_token is not None and not pretokenized:
            separator = get_special_token_from_cfg(options.sequence_separator_token, tokenizer)
            if separator is None:
                raise ValueError(
                    f"sequence_separator_token is {options.sequence_separator_token!r}, but the tokenizer "
                    "has no such token: give a token id or null"
                )
        return cls(
            dataset, column=column, pretokenized=pretokenized, tokenizer=tokenizer,
            context_size=options.context_size,
            begin_batch_token_id=begin, separator_token_id=separator, **patience, **more,
        )  # fmt: skip

    @property
    def held_out(self) -> list[Any]:
        """The held-out documents, text or token ids, in the order of the dataset."""
        if self._held_out is None:
            self._held_out = list(islice(self._documents(self.dataset), self.held_out_documents))
        return self._held_out

    def first(self) -> Iterator[Tensor]:
        """Rows of the dataset from its beginning, in its own order, once; the same on every rank."""
        return self._pack(self._documents(self.dataset))

    def evaluation(self, split: str) -> list[Tensor]:
        """All rows of the held-out documents of split ``validation`` or ``test``; the same on every rank."""
        if split not in ("validation", "test"):
            raise ValueError(f"split must be 'validation' or 'test', got {split!r}")
        return list(self._pack(iter(self.held_out[split == "test" :: 2])))

    def training(self) -> Iterator[Tensor]:
        """Endless rows of this rank's training documents, each (context_size,), on the CPU.

        Raises:
            ValueError: If an epoch has no document for this rank.
        """
        return self._pack(self._endless_documents())

    def _documents(self, dataset: HfDataset) -> Iterator[Any]:
        rows = retrying(
            _restartable(dataset),
            retries=self.retries,
            backoff_seconds=self.backoff_seconds,
            what="the dataset",
        )
        return (row[self.column] for row in rows)

    def _endless_documents(self) -> Iterator[Any]:
        held_out = {document_key(document) for document in self.held_out}
        self.epoch = 0
        while True:
            dataset = self.dataset
            if self.shuffle:
                seed = self.seed + self.epoch
                dataset = (
                    dataset.shuffle(seed=seed)
                    if isinstance(dataset, Dataset)
                    else dataset.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
                )
            by_content = self.world_size > 1
            if by_content and (isinstance(dataset, Dataset) or dataset.num_shards % self.world_size == 0):
                dataset = split_dataset_by_node(dataset, rank=self.rank, world_size=self.world_size)
                by_content = False
            n = 0
            for document in self._documents(dataset):
                key = document_key(document)
                # datasets would count documents off instead, and miscounts when it goes on after a failure
                # (5.2)
                if by_content and int.from_bytes(key, "big") % self.world_size != self.rank:
                    continue
                if key in held_out:
                    self.documents_left_out += 1
                elif document:
                    n += 1
                    yield document
            if n == 0:
                raise ValueError(
                    f"no document is left for training on rank {self.rank} of {self.world_size}: the dataset "
                    f"has {self.documents_left_out} for this rank and all are held out "
                    f"(held_out_documents={self.held_out_documents}): hold out fewer or give more data"
                )
            self.epoch += 1
            rank_zero_warn(
                f"the dataset is exhausted after {n} documents a rank: epoch {self.epoch + 1} begins"
            )

    def _pack(self, documents: Iterator[Any]) -> Iterator[Tensor]:
        if not self.pack:
            return self._one_by_one(documents)
        if self.pretokenized:
            return self._cut(documents)
        return concat_and_batch_sequences(
            self._tokenize(documents),
            context_size=self.context_size,
            begin_batch_token_id=self.begin_batch_token_id,
            sequence_separator_token_id=self.separator_token_id,
        )

    def _one_by_one(self, documents: Iterator[Any]) -> Iterator[Tensor]:
        as_tokens = (torch.as_tensor(d, dtype=torch.long) for d in documents)
        begin = [] if self.begin_batch_token_id is None else [torch.tensor([self.begin_batch_token_id])]
        for tokens in as_tokens if self.pretokenized else self._tokenize(documents):
            for piece in tokens.split(self.context_size - len(begin)):
                yield torch.cat([*begin, piece])

    def _cut(self, documents: Iterator[Any]) -> Iterator[Tensor]:
        for document in documents:
            tokens = torch.as_tensor(document, dtype=torch.long)
            if len(tokens) < self.context_size:
                raise ValueError(
                    f"a pretokenised row has {len(tokens)} tokens, fewer than context_size "
                    f"{self.context_size}: set context_size to the length of the rows or less"
                )
            yield from tokens.split(self.context_size)[: len(tokens) // self.context_size]

    def _tokenize(self, documents: Iterator[Any]) -> Iterator[Tensor]:
        assert self.tokenizer is not None
        while texts := list(islice(documents, _TOKENIZER_BATCH)):
            for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                yield torch.tensor(ids, dtype=torch.long)
