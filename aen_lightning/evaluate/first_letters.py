"""Words of a model's vocabulary, by their first letter, and their activations."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aen_lightning.evaluate.inputs import TextInputs
from aen_lightning.progress import counted

MIN_WORDS = 20
MAX_WORDS = 150
"""Words a letter: of fewer, none; of more, the first in the vocabulary, which are the most usual."""
PREFIX = "The first letter of the word"
"""What stands before a word, so that the model looks at its spelling."""
_BEGINS_WORD = ("Ġ", "▁")  # how byte-level and SentencePiece vocabularies write a space
_WORD = re.compile(r"[A-Za-z]{3,}")
_BATCH = 64


class Word(NamedTuple):
    """A token that is a word of its own; the letter is a small one."""

    token: int
    letter: str


def first_letter_words(tokenizer: Any) -> list[Word]:
    """Words of at least three letters, all of a to z, each a single token that begins a word.

    Args:
        tokenizer: Of transformers. A vocabulary that marks no beginnings has whole words only.

    Raises:
        ValueError: If fewer than two letters have ``MIN_WORDS`` words.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    marked = any(text.startswith(_BEGINS_WORD) for text, _ in vocabulary)
    by_letter: dict[str, list[Word]] = defaultdict(list)
    for text, token in vocabulary:
        word = text[1:] if text.startswith(_BEGINS_WORD) else text
        if marked and word == text:
            continue
        if _WORD.fullmatch(word):
            by_letter[word[0].lower()].append(Word(token, word[0].lower()))
    enough = {letter: words for letter, words in by_letter.items() if len(words) >= MIN_WORDS}
    if len(enough) < 2:
        counts = ", ".join(f"{letter}: {len(words)}" for letter, words in sorted(by_letter.items()))
        raise ValueError(
            f"the suite absorption needs at least {MIN_WORDS} words for each of two first letters; "
            f"the tokens of this vocabulary that are words begin with {counts or 'none'}"
        )
    return [word for letter in sorted(enough) for word in enough[letter][:MAX_WORDS]]


@torch.no_grad()
def read_words(inputs: TextInputs, words: Sequence[Word]) -> Tensor:
    """Raw activations at each word after ``PREFIX``, (n, d_in), float32, on the CPU."""
    prefix = torch.tensor(inputs.data.source.tokenizer()(PREFIX)["input_ids"], dtype=torch.int64)
    tokens = torch.tensor([word.token for word in words])
    rows = torch.cat([prefix.expand(len(words), -1), tokens.unsqueeze(1)], dim=1).split(_BATCH)
    model, hook_name = inputs.data.language_model, inputs.hook.hook_name
    return torch.cat(
        [
            model.activations(row)[hook_name][:, -1].float().cpu()
            for row in counted(rows, "reading words of the vocabulary", len(rows), "batches")
        ]
    )
