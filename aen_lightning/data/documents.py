"""From a dataset of documents to rows of tokens: opening, holding out, sharding over ranks, tokenising, packing."""

from __future__ import annotations

import glob
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.distributed import split_dataset_by_node
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from torch import Tensor
from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
HfDataset: TypeAlias = "Dataset | IterableDataset"

_TOKEN_COLUMNS = ("tokens", "input_ids")  # in the order SAELens looks for them
_TEXT_COLUMNS = ("text", "content", "problem")
_BUILDERS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv",
    ".arrow": "arrow",
}  # fmt: skip
_COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
_TOKENIZER_BATCH = 64  # documents a call of a fast tokenizer


def open_dataset(
    dataset_path: str | Sequence[str], *, name: str | None = None, split: str = "train", streaming: bool = False
) -> HfDataset:
    """Open documents by ``datasets``, whatever they lie in. Remote code is never run.

    Args:
        dataset_path: A Hub name; a folder (one that ``Dataset.save_to_disk`` wrote, or one of data files); a file
            ``.json``, ``.jsonl``, ``.parquet``, ``.csv``, ``.arrow`` or ``.txt`` (a document a line), compressed or
            not; a glob of such files; or a list of files and globs.
        name: Subset (configuration) of a Hub dataset.
        split: Which split to read.
        streaming: Read as the run goes instead of loading first.

    Raises:
        FileNotFoundError: If a file or glob names nothing.
        ValueError: If the kind of file is unknown, or files of different kinds are mixed.
    """
    paths = [dataset_path] if isinstance(dataset_path, str) else list(dataset_path)
    if len(paths) == 1 and not _is_file_pattern(paths[0]):
        if (Path(paths[0]) / "dataset_info.json").is_file() and (Path(paths[0]) / "state.json").is_file():
            dataset = load_from_disk(paths[0])
            return dataset.to_iterable_dataset() if streaming else dataset
        return load_dataset(paths[0], name, split=split, streaming=streaming)
    files = [file for path in paths for file in _matching(path)]
    builders = {_builder(file) for file in files}
    if len(builders) > 1:
        raise ValueError(f"dataset_path mixes kinds of files ({', '.join(sorted(builders))}): give files of one kind")
    return load_dataset(builders.pop(), data_files={split: files}, split=split, streaming=streaming)


def _suffix(path: str) -> str:
    suffixes = [s.lower() for s in Path(path).suffixes]
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSIONS:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def _is_file_pattern(path: str) -> bool:
    return Path(path).is_file() or any(c in path for c in "*?[") or "://" in path or _suffix(path) in _BUILDERS


def _matching(path: str) -> list[str]:
    if "://" in path:
        return [path]
    found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207  # Path.glob takes no absolute patterns
    if not found:
        raise FileNotFoundError(f"dataset_path {path!r} matches no file")
    return found


def _builder(file: str) -> str:
    if (suffix := _suffix(file)) not in _BUILDERS:
        raise ValueError(f"cannot tell what kind of data {file!r} holds: expected a name in {', '.join(_BUILDERS)}")
    return _BUILDERS[suffix]


def find_column(row: dict[str, Any], text_column: str | None) -> tuple[str, bool]:
    """The column to read in rows like ``row``, and whether it holds token ids rather than text.

    Args:
        row: The first row.
        text_column: The user's choice; None looks for ``tokens``, ``input_ids``, ``text``, ``content``, ``problem``.

    Raises:
        ValueError: If the column does not exist or holds neither text nor token ids.
    """
    known = (*_TOKEN_COLUMNS, *_TEXT_COLUMNS)
    column = text_column or next((c for c in known if c in row), None)
    if column is None or column not in row:
        wanted = f"text_column {text_column!r}" if text_column else f"a column among {', '.join(known)}"
        raise ValueError(f"the dataset has no {wanted}: set text_column to one of its columns, {', '.join(row)}")
    value = row[column]
    if isinstance(value, str):
        return column, False
    if len(value) and all(isinstance(token, int) for token in list(value)[:8]):
        return column, True
    raise ValueError(f"column {column!r} holds {type(value).__name__}, expected text or a list of token ids")


def document_key(document: Any) -> bytes:
    """A fingerprint of a document's content, 8 bytes, the same on every machine."""
    content = document.encode() if isinstance(document, str) else repr(list(document)).encode()
    return hashlib.blake2b(content, digest_size=8).digest()


def retrying(
    start: Callable[[int], Iterator[T]], *, retries: int, backoff_seconds: float, what: str,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[T]:  # fmt: skip
    """Iterate over a source that may fail for a while, e.g. a dataset streamed over a network.

    An iterator that has raised is often finished, and would pass for the end of the data if asked again; so after each
    failure a new one is made.

    Args:
        start: Given the number of items already had, makes an iterator over the rest.
        retries: Failures in a row that are borne.
        backoff_seconds: Wait after the first failure, doubled after each further one.
        what: Name of the source, for the warning.
        sleep: Waits.

    Raises:
        OSError: Or another network error, the last one, after ``retries`` failures in a row; at once for a file that is
            missing or forbidden.
    """
    import aiohttp
    import httpx

    had, failures = 0, 0
    iterator = start(0)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except (FileNotFoundError, PermissionError):
            raise
        except (OSError, httpx.HTTPError, aiohttp.ClientError) as err:
            failures += 1
            if failures > retries:
                raise
            wait = backoff_seconds * 2 ** (failures - 1)
            warnings.warn(
                f"reading {what} failed after {had} documents ({type(err).__name__}: {err}); waiting {wait:g} s, then "
                f"try {failures} of {retries}",
                stacklevel=2,
            )
            sleep(wait)
            iterator = start(had)
            continue
        had, failures = had + 1, 0
        yield item


def _restartable(dataset: HfDataset) -> Callable[[int], Iterator[dict[str, Any]]]:
    def start(had: int) -> Iterator[dict[str, Any]]:
        if isinstance(dataset, Dataset):
            return iter(dataset.select(range(had, len(dataset))))
        if had:  # where datasets itself stands; documents in its shuffle buffer are lost with the broken iterator
            dataset.load_state_dict(dataset.state_dict())
        return iter(dataset)

    if isinstance(dataset, IterableDataset):
        dataset.state_dict()  # from here on it keeps track of its position
    return start


class TokenRows:
    """Rows of ``context_size`` tokens out of a dataset, with some documents held out.

    The first ``held_out_documents`` documents of the dataset are held out: even-numbered ones for validation,
    odd-numbered ones for testing. A training document with the very same content as one of them is left out as well,
    so shuffling, sharding and repetition cannot bring a held-out text into training.

    Args:
        dataset: Documents.
        column: Column to read.
        pretokenized: Whether it holds token ids: each document is then cut into rows of its own, as it is (SAELens
            reads such data so), a remainder shorter than a row left out. Text is tokenised without special tokens and
            packed without gaps.
        tokenizer: For text.
        context_size: Tokens a row.
        begin_batch_token_id: Put before every row of text, or None.
        separator_token_id: Put between documents of text, or None.
        held_out_documents: Number of documents held out.
        shuffle: Whether training takes documents in a new random order each epoch.
        shuffle_buffer: Documents in the shuffle buffer of a streamed dataset; another is shuffled whole.
        seed: Of the document order; the same on all ranks.
        rank: This process.
        world_size: Number of processes, which share the training documents out: of a streamed dataset by file if the number
            of files is a multiple of ``world_size``, else by content, every process reading all of it.
        retries: Failures in a row of a streamed dataset that are borne.
        backoff_seconds: Wait after the first of them, then doubled.
    """

    def __init__(
        self, dataset: HfDataset, *, column: str, pretokenized: bool, tokenizer: PreTrainedTokenizerBase | None,
        context_size: int, begin_batch_token_id: int | None = None, separator_token_id: int | None = None,
        held_out_documents: int = 0, shuffle: bool = True, shuffle_buffer: int = 1000, seed: int = 0, rank: int = 0,
        world_size: int = 1, retries: int = 5, backoff_seconds: float = 2.0,
    ) -> None:  # fmt: skip
        self.dataset = dataset.select_columns([column])
        self.column, self.pretokenized, self.tokenizer = column, pretokenized, tokenizer
        self.context_size = context_size
        self.begin_batch_token_id, self.separator_token_id = begin_batch_token_id, separator_token_id
        self.held_out_documents = held_out_documents
        self.shuffle, self.shuffle_buffer, self.seed = shuffle, shuffle_buffer, seed
        self.rank, self.world_size = rank, world_size
        self.retries, self.backoff_seconds = retries, backoff_seconds
        self.epoch = 0
        self.documents_left_out = 0
        self._held_out: list[Any] | None = None

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
        return list(self._pack(iter(self.held_out[split == "test" :: 2])))

    def training(self) -> Iterator[Tensor]:
        """Endless rows of this rank's training documents, each (context_size,), on the CPU.

        Raises:
            ValueError: If an epoch has no document for this rank.
        """
        return self._pack(self._endless_documents())

    def _documents(self, dataset: HfDataset) -> Iterator[Any]:
        rows = retrying(
            _restartable(dataset), retries=self.retries, backoff_seconds=self.backoff_seconds, what="the dataset"
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
                # datasets would count documents off instead, and miscounts when it goes on after a failure (5.2)
                if by_content and int.from_bytes(key, "big") % self.world_size != self.rank:
                    continue
                if key in held_out:
                    self.documents_left_out += 1
                elif document:
                    n += 1
                    yield document
            if n == 0:
                raise ValueError(
                    f"no document is left for training on rank {self.rank} of {self.world_size}: the dataset has "
                    f"{self.documents_left_out} for this rank and all are held out (held_out_documents="
                    f"{self.held_out_documents}): hold out fewer or give more data"
                )
            self.epoch += 1
            rank_zero_warn(f"the dataset is exhausted after {n} documents a rank: epoch {self.epoch + 1} begins")

    def _pack(self, documents: Iterator[Any]) -> Iterator[Tensor]:
        if self.pretokenized:
            return self._cut(documents)
        return concat_and_batch_sequences(
            self._tokenize(documents),
            context_size=self.context_size,
            begin_batch_token_id=self.begin_batch_token_id,
            sequence_separator_token_id=self.separator_token_id,
        )

    def _cut(self, documents: Iterator[Any]) -> Iterator[Tensor]:
        for document in documents:
            tokens = torch.as_tensor(document, dtype=torch.long)
            if len(tokens) < self.context_size:
                raise ValueError(
                    f"a pretokenised row has {len(tokens)} tokens, fewer than context_size {self.context_size}: "
                    "set context_size to the length of the rows or less"
                )
            yield from tokens.split(self.context_size)[: len(tokens) // self.context_size]

    def _tokenize(self, documents: Iterator[Any]) -> Iterator[Tensor]:
        assert self.tokenizer is not None
        while texts := list(islice(documents, _TOKENIZER_BATCH)):
            for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                yield torch.tensor(ids, dtype=torch.long)
