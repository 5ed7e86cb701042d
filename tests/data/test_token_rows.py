"""Which documents become rows, on which rank, in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise, takewhile
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from aen_lightning.data.options import DatasetOptions
from aen_lightning.data.token_rows import TokenRows
from tests.support.text import documents, ids_of
from tests.support.tiny_models import BOS, EOS, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:the dataset is exhausted")


def token_rows(dataset: Dataset | IterableDataset, **options: Any) -> TokenRows:
    defaults: dict[str, Any] = {
        "column": "input_ids",
        "pretokenized": True,
        "tokenizer": None,
        "context_size": 4,
    }
    return TokenRows(dataset, **{**defaults, **options})


def numbered(n: int, streaming: bool, num_shards: int = 1) -> Dataset | IterableDataset:
    dataset = Dataset.from_dict({"input_ids": [[i] * 4 for i in range(n)]})
    return dataset.to_iterable_dataset(num_shards=num_shards) if streaming else dataset


def epoch_of(rows: TokenRows, n: int) -> list[int]:
    return [int(row[0]) for row in islice(rows.training(), n)]


def first_epoch(rows: TokenRows) -> list[int]:
    return [int(row[0]) for row in takewhile(lambda _: rows.epoch == 0, rows.training())]


@pytest.mark.parametrize(("streaming", "num_shards"), [(False, 1), (True, 1), (True, 4)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_the_documents_out_and_none_is_held_out(streaming: bool, num_shards: int, shuffle: bool):
    dataset = numbered(44, streaming, num_shards)
    ranks = [
        first_epoch(token_rows(dataset, held_out_documents=8, shuffle=shuffle, seed=1, rank=r, world_size=2))
        for r in range(2)
    ]
    assert sorted(ranks[0] + ranks[1]) == list(range(8, 44))
    assert min(len(ranks[0]), len(ranks[1])) >= 10  # fair shares, but for the held-out documents


@pytest.mark.parametrize(("streaming", "num_shards"), [(False, 1), (True, 1), (True, 4)])
def test_an_epoch_of_all_ranks_is_every_document_once(streaming: bool, num_shards: int):
    dataset = numbered(40, streaming, num_shards)
    seen = [first_epoch(token_rows(dataset, seed=1, rank=r, world_size=2)) for r in range(2)]
    assert sorted(seen[0] + seen[1]) == list(range(40))
    assert seen[0] != sorted(seen[0])


@pytest.mark.parametrize("streaming", [False, True])
def test_the_stream_is_endless_and_each_epoch_has_a_new_order(streaming: bool):
    rows = token_rows(numbered(30, streaming), seed=1)
    with pytest.warns(UserWarning, match="exhausted after 30 documents a rank: epoch 2 begins"):
        seen = epoch_of(rows, 90)
    epochs = [seen[:30], seen[30:60], seen[60:]]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epoch_of(token_rows(numbered(30, streaming), seed=1), 90) == seen
    assert epoch_of(token_rows(numbered(30, streaming), seed=2), 90) != seen


@pytest.mark.parametrize("streaming", [False, True])
def test_training_never_sees_a_held_out_document_not_even_a_copy(streaming: bool):
    texts = documents(60)
    dataset = Dataset.from_dict({"text": texts + texts[3:5]})  # copies of two held-out documents, at the end
    rows = TokenRows(
        dataset.to_iterable_dataset() if streaming else dataset, column="text", pretokenized=False,
        tokenizer=tiny_tokenizer(), context_size=16, separator_token_id=EOS, held_out_documents=10, seed=0,
    )  # fmt: skip
    # two full epochs; a document shows as its pair of words
    training = torch.cat(list(islice(rows.training(), 100))).tolist()
    pairs = Counter(pairwise(training))
    pair_of = {text: tuple(ids_of(text)[:2]) for text in texts}
    assert rows.epoch >= 1
    assert rows.documents_left_out >= 12
    assert all(pairs[pair_of[text]] > 0 for text in texts[10:])
    assert all(pairs[pair_of[text]] == 0 for text in texts[:10])
    validation, test = (set(pairwise(torch.cat(rows.evaluation(s)).tolist())) for s in ("validation", "test"))
    assert all(pair_of[text] in validation and pair_of[text] not in test for text in texts[0:8:2])
    assert all(pair_of[text] in test and pair_of[text] not in validation for text in texts[1:8:2])


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="split must be 'validation' or 'test', got 'val'"):
        token_rows(numbered(5, False), held_out_documents=2).evaluation("val")


def test_all_documents_held_out_is_an_error():
    with pytest.raises(ValueError, match=r"no document is left for training .*\(held_out_documents=10\)"):
        next(token_rows(numbered(5, False), held_out_documents=10).training())


def test_pretokenised_rows_are_cut_and_short_ones_refused():
    dataset = Dataset.from_dict({"input_ids": [[*range(10)], [*range(20, 28)]]})
    rows = list(token_rows(dataset).first())
    assert [row.tolist() for row in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [20, 21, 22, 23], [24, 25, 26, 27]]
    with pytest.raises(ValueError, match="has 3 tokens, fewer than context_size 4"):
        next(token_rows(Dataset.from_dict({"input_ids": [[1, 2, 3]]})).first())


@pytest.mark.parametrize("n_shards", [1, 4])
def test_a_streamed_dataset_that_fails_goes_on_at_the_same_document(n_shards: int):
    failures = {"left": 0}

    def generate(shards: list[int]) -> Iterator[dict[str, list[int]]]:
        for shard in shards:
            for i in range(shard, 12, n_shards):
                if i == 7 and failures["left"]:
                    failures["left"] -= 1
                    raise ConnectionResetError("peer went away")
                yield {"input_ids": [i] * 4}

    def rows(**options: int) -> TokenRows:
        failures["left"] = 2
        dataset = IterableDataset.from_generator(generate, gen_kwargs={"shards": list(range(n_shards))})
        return token_rows(dataset, shuffle=False, retries=3, backoff_seconds=0.0, **options)

    with pytest.warns(UserWarning, match=r"failed after \d+ documents .* try 2 of 3"):
        assert sorted(int(row[0]) for row in rows().first()) == list(range(12))
    with pytest.warns(UserWarning, match=r"failed after \d+ documents .* try 2 of 3"):
        ranks = [first_epoch(rows(rank=rank, world_size=2)) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == list(range(12))
    assert ranks[0]
    assert ranks[1]


def test_options_name_the_tokens_between_documents_and_at_the_beginning():
    dataset = Dataset.from_dict({"text": ["w4 w5 w6", "w7 w8 w9"]})
    options = DatasetOptions(context_size=4, prepend_bos=True, sequence_separator_token="eos")
    rows = TokenRows.of(options, dataset, tiny_tokenizer()).first()
    assert [row.tolist() for row in rows] == [[BOS, 4, 5, 6], [BOS, 7, 8, 9]]
    rows = TokenRows.of(
        DatasetOptions(context_size=7, sequence_separator_token=60), dataset, tiny_tokenizer()
    ).first()
    assert next(rows).tolist() == [4, 5, 6, 60, 7, 8, 9]


def test_tokens_that_the_tokenizer_lacks_are_errors_for_text_only():
    bare = tiny_tokenizer()
    bare.bos_token = bare.eos_token = None
    text, tokens = Dataset.from_dict({"text": ["w4 w5"]}), Dataset.from_dict({"tokens": [[4, 5]]})
    options = DatasetOptions(context_size=2, prepend_bos=True)
    with pytest.raises(ValueError, match="prepend_bos is set, but the tokenizer has no BOS token"):
        TokenRows.of(options, text, bare)
    with pytest.raises(
        ValueError, match="sequence_separator_token is 'eos', but the tokenizer has no such token"
    ):
        TokenRows.of(DatasetOptions(context_size=2), text, bare)
    assert [row.tolist() for row in TokenRows.of(options, tokens, bare).first()] == [[4, 5]]
    with pytest.raises(ValueError, match="prepend_bos is set"):  # a document is a row, and begins with BOS
        TokenRows.of(options, tokens, bare, pack=False)
    with pytest.raises(ValueError, match="no tokenizer to read 'text' with: give tokenizer_name"):
        TokenRows.of(options, text, None)
    with pytest.raises(ValueError, match="has no rows"):
        TokenRows.of(options, text.select([]), bare)
