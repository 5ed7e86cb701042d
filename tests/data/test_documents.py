"""Opening documents, whatever they lie in, and reading on after failures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from aen_lightning.data.documents import find_column, open_dataset, retrying


def test_open_dataset_opens_what_documents_lie_in(tmp_path: Path):
    texts = [f"w{i} w{i + 1}" for i in range(6)]
    dataset = Dataset.from_dict({"text": texts})
    dataset.to_json(tmp_path / "a.jsonl")
    dataset.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n".join(texts))
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "data").mkdir()
    for i in range(2):
        dataset.select(range(3 * i, 3 * i + 3)).to_parquet(tmp_path / "data" / f"{i}.parquet")
    for path in ("a.jsonl", "a.parquet", "a.txt", "saved", "data", "data/*.parquet"):
        for streaming in (False, True):
            rows = open_dataset(str(tmp_path / path), streaming=streaming)
            assert [row["text"] for row in rows] == texts, path
    assert len(open_dataset([str(tmp_path / "data" / f"{i}.parquet") for i in (1, 0)])) == 6
    with pytest.raises(FileNotFoundError, match="matches no file"):
        open_dataset(str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match="mixes kinds of files"):
        open_dataset([str(tmp_path / "a.jsonl"), str(tmp_path / "a.txt")])


@pytest.mark.parametrize("where", ["a.jsonl", "saved"])
@pytest.mark.parametrize(
    ("split", "rows"),
    [("train[:-2]", [0, 1, 2, 3]), ("held[50%:]", [3, 4, 5]), ("train[:1]+train[5:]", [0, 5])],
)
def test_a_part_of_a_split_of_local_files(tmp_path: Path, where: str, split: str, rows: list[int]):
    dataset = Dataset.from_dict({"n": list(range(6))})
    dataset.to_json(tmp_path / "a.jsonl")
    dataset.save_to_disk(tmp_path / "saved")
    assert [row["n"] for row in open_dataset(str(tmp_path / where), split=split)] == rows


def test_a_part_of_a_streamed_split_is_refused(tmp_path: Path):
    Dataset.from_dict({"n": [1, 2]}).to_json(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"dataset_split 'train\[:1\]' is a part .* streaming to false"):
        open_dataset(str(tmp_path / "a.jsonl"), split="train[:1]", streaming=True)


def test_find_column():
    assert find_column({"id": 1, "text": "a"}, None) == ("text", False)
    assert find_column({"text": "a", "tokens": [1, 2]}, None) == ("tokens", True)
    assert find_column({"body": "a", "text": "b"}, "body") == ("body", False)
    with pytest.raises(ValueError, match="set text_column to one of its columns, body"):
        find_column({"body": "a"}, None)
    with pytest.raises(ValueError, match="expected text or a list of token ids"):
        find_column({"text": ["a", "b"]}, None)


def flaky(fail_at: set[int], n: int = 10) -> tuple[Any, list[int]]:
    """A source that fails once at each of the given items, and whose iterators are dead after that."""
    starts: list[int] = []

    def start(had: int) -> Iterator[int]:
        starts.append(had)
        for i in range(had, n):
            if i in fail_at:
                fail_at.remove(i)
                raise ConnectionError(f"no answer for {i}")
            yield i

    return start, starts


def test_retrying_loses_nothing_and_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch):
    start, starts = flaky({0, 4, 9})
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.warns(
        UserWarning, match=r"reading books failed after 4 documents \(ConnectionError: no answer for 4"
    ):
        items = list(retrying(start, retries=2, backoff_seconds=0.5, what="books"))
    assert items == list(range(10))
    assert starts == [0, 0, 4, 9]
    assert waits == [0.5, 0.5, 0.5]  # an item in between ends a run of failures


@pytest.mark.filterwarnings("ignore:reading books failed")
def test_retrying_gives_up_and_does_not_retry_what_cannot_mend(monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def broken(had: int) -> Iterator[int]:
        raise TimeoutError("still nothing")
        yield

    with pytest.raises(TimeoutError, match="still nothing"):
        list(retrying(broken, retries=3, backoff_seconds=1.0, what="books"))
    assert waits == [1.0, 2.0, 4.0]

    def missing(had: int) -> Iterator[int]:
        raise FileNotFoundError("no such file")
        yield

    with pytest.raises(FileNotFoundError):
        list(retrying(missing, retries=3, backoff_seconds=1.0, what="books"))
    assert len(waits) == 3
