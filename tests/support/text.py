"""Documents that can be told apart, and how they are packed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.support.tiny_models import EOS


def documents(n: int, length: int = 11) -> list[str]:
    """Document i says one pair of words over and over, a pair no other document has."""
    pairs = [(4 + i // 20, 30 + i % 20) for i in range(n)]
    return [" ".join(f"w{pair[j % 2]}" for j in range(length)) for pair in pairs]


def ids_of(document: str) -> list[int]:
    return [int(word[1:]) for word in document.split()]


def packed_by_hand(texts: list[str], context: int) -> Iterator[Tensor]:
    """Packing with plain lists.

    A document that does not begin a row has an EOS before it, as SAELens packs.
    """
    row: list[int] = []
    for text in texts:
        tokens = [EOS, *ids_of(text)] if row else ids_of(text)
        for token in tokens:
            row.append(token)
            if len(row) == context:
                yield torch.tensor(row)
                row = []
