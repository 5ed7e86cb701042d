"""Datasets of documents: opening them, finding the text, and reading on after failures of the network."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from datasets import Dataset, IterableDataset, ReadInstruction, load_dataset, load_from_disk

from aen_lightning.retry import retry

T = TypeVar("T")
HfDataset: TypeAlias = "Dataset | IterableDataset"

_TOKEN_COLUMNS = ("tokens", "input_ids")  # in the order SAELens looks for them
_TEXT_COLUMNS = ("text", "content", "problem")
_BUILDERS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".txt": "text",
    ".csv": "csv",
    ".arrow": "arrow",
}  # fmt: skip
_COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")


def open_dataset(
    dataset_path: str | Sequence[str],
    *,
    name: str | None = None,
    split: str = "train",
    streaming: bool = False,
) -> HfDataset:
    """Open documents by ``datasets``, whatever they lie in. Remote code is never run.

    Args:
        dataset_path: A Hub name; a folder (one that ``Dataset.save_to_disk`` wrote, or one of data files); a
            file ``.json``, ``.jsonl``, ``.parquet``, ``.csv``, ``.arrow`` or ``.txt`` (a document a line),
            compressed or not; a glob of such files; or a list of files and globs.
        name: Subset (configuration) of a Hub dataset.
        split: Which split to read, or a part of it: ``train[:-500]``. Files, and what ``save_to_disk`` wrote,
            are a split of any name.
        streaming: Read as the run goes instead of loading first.

    Raises:
        FileNotFoundError: If a file or glob names nothing.
        ValueError: If the kind of file is unknown, files of different kinds are mixed, or the split does not
            exist.
    """
    paths = [dataset_path] if isinstance(dataset_path, str) else list(dataset_path)
    if streaming and "[" in split:
        raise ValueError(
            f"dataset_split {split!r} is a part of a split, which a stream cannot give: set streaming to "
            "false"
        )
    if len(paths) == 1 and not _is_file_pattern(paths[0]):
        if (Path(paths[0]) / "dataset_info.json").is_file() and (Path(paths[0]) / "state.json").is_file():
            dataset = _part(load_from_disk(paths[0]), split)
            return dataset.to_iterable_dataset() if streaming else dataset
        return load_dataset(paths[0], name, split=split, streaming=streaming)
    files = [file for path in paths for file in _matching(path)]
    builders = {_builder(file) for file in files}
    if len(builders) > 1:
        raise ValueError(
            f"dataset_path mixes kinds of files ({', '.join(sorted(builders))}): give files of one kind"
        )
    return load_dataset(
        builders.pop(), data_files={_split_name(split): files}, split=split, streaming=streaming
    )


def _split_name(split: str) -> str:
    return split.partition("[")[0]


def _part(dataset: Dataset, split: str) -> Dataset:
    if "[" not in split:
        return dataset
    parts = ReadInstruction.from_spec(split).to_absolute({_split_name(split): len(dataset)})
    return dataset.select([i for part in parts for i in range(part.from_, part.to)])


def _suffix(path: str) -> str:
    suffixes = [s.lower() for s in Path(path).suffixes]
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSIONS:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def _is_file_pattern(path: str) -> bool:
    return (
        Path(path).is_file() or any(c in path for c in "*?[") or "://" in path or _suffix(path) in _BUILDERS
    )


def _matching(path: str) -> list[str]:
    if "://" in path:
        return [path]
    found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207  # Path.glob takes no absolute patterns
    if not found:
        raise FileNotFoundError(f"dataset_path {path!r} matches no file")
    return found


def _builder(file: str) -> str:
    if (suffix := _suffix(file)) not in _BUILDERS:
        raise ValueError(
            f"cannot tell what kind of data {file!r} holds: expected a name in {', '.join(_BUILDERS)}"
        )
    return _BUILDERS[suffix]


def find_column(row: dict[str, Any], text_column: str | None) -> tuple[str, bool]:
    """The column to read in rows like ``row``, and whether it holds token ids rather than text.

    Args:
        row: The first row.
        text_column: The user's choice; None looks for ``tokens``, ``input_ids``, ``text``, ``content``,
            ``problem``.

    Raises:
        ValueError: If the column does not exist or holds neither text nor token ids.
    """
    known = (*_TOKEN_COLUMNS, *_TEXT_COLUMNS)
    column = text_column or next((c for c in known if c in row), None)
    if column is None or column not in row:
        wanted = f"text_column {text_column!r}" if text_column else f"a column among {', '.join(known)}"
        raise ValueError(
            f"the dataset has no {wanted}: set text_column to one of its columns, {', '.join(row)}"
        )
    value = row[column]
    if isinstance(value, str):
        return column, False
    if len(value) and all(isinstance(token, int) for token in list(value)[:8]):
        return column, True
    raise ValueError(f"column {column!r} holds {type(value).__name__}, expected text or a list of token ids")


def retrying(
    start: Callable[[int], Iterator[T]], *, retries: int, backoff_seconds: float, what: str
) -> Iterator[T]:
    """Iterate over a source that may fail for a while, e.g. a dataset streamed over a network.

    An iterator that has raised is often finished, and would pass for the end of the data if asked again; so
    after each failure a new one is made.

    Args:
        start: Given the number of items already had, makes an iterator over the rest.
        retries: Failures in a row that are borne.
        backoff_seconds: Wait after the first failure, doubled after each further one.
        what: Name of the source, for the warning.

    Raises:
        OSError: Or another network error, the last one, after ``retries`` failures in a row; at once for a
            file that is missing or forbidden.
    """
    import aiohttp
    import httpx

    had, end = 0, object()
    iterator: Iterator[T] | None = None

    def advance() -> Any:
        nonlocal iterator
        at, iterator = start(had) if iterator is None else iterator, None
        item = next(at, end)
        iterator = at
        return item

    def worth_it(error: Exception) -> bool:
        for_good = isinstance(error, FileNotFoundError | PermissionError)
        return isinstance(error, OSError | httpx.HTTPError | aiohttp.ClientError) and not for_good

    def announce(error: Exception, wait: float, failures: int) -> None:
        warnings.warn(
            f"reading {what} failed after {had} documents ({type(error).__name__}: {error}); waiting "
            f"{wait:g} s, then try {failures} of {retries}",
            stacklevel=4,
        )

    while True:
        item = retry(
            advance, attempts=retries + 1, worth_it=worth_it, announce=announce, wait_seconds=backoff_seconds
        )
        if item is end:
            return
        had += 1
        yield item
