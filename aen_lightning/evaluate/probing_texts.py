"""Short labelled texts to probe on, made here of word lists: nothing is downloaded, and nobody's text is used.

Training and test texts are built of different words, so a probe that learnt a word by heart gains nothing.
They are easy on purpose: what is asked is whether *few features* hold the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple


class Task(NamedTuple):
    """A question with two answers.

    Texts of the first and of the second answer, to train a probe on and to test it.
    """

    train: tuple[list[str], list[str]]
    test: tuple[list[str], list[str]]


def _task(
    templates: tuple[Sequence[str], Sequence[str]], first: Sequence[str], second: Sequence[str]
) -> Task:
    """Texts of every template with every word; the last third of the words makes the tests."""
    train, test = [], []
    for mine, words in zip(templates, (first, second), strict=True):
        cut = len(words) - len(words) // 3
        train.append([t.format(w) for t, w in product(mine, words[:cut])])
        test.append([t.format(w) for t, w in product(mine, words[cut:])])
    return Task((train[0], train[1]), (test[0], test[1]))


_THINGS = (
    "book", "chair", "train", "soup", "film", "hotel", "phone", "garden", "song", "lamp", "jacket", "game",
)  # fmt: skip
_SAME = (
    "I bought the {} and it was", "Everyone agreed that the {} was", "To be honest, the {} turned out",
)  # fmt: skip
_GOOD = tuple(f"{t} wonderful, I would recommend it to all my friends." for t in _SAME)
_BAD = tuple(f"{t} terrible, I would never pay for it again." for t in _SAME)
_VERBS = (
    "visit the museum", "paint the fence", "call the doctor", "sell the house", "write a letter", "cook dinner",
    "repair the roof", "plant a tree", "open the shop", "clean the kitchen", "feed the horses", "read the report",
)  # fmt: skip
_ASKED = ("When did they decide to {}?", "Why would you {}?", "Who wants to {} with me?")
_TOLD = ("They decided to {}.", "You would {}.", "My sister wants to {} with me.")
_FUTURE = ("Tomorrow we will {}.", "Next year she is going to {}.", "Soon they will {}.")
_PAST = ("Yesterday we had to {}.", "Last year she used to {}.", "Long ago they had to {}.")
_NAMES = (
    "total", "count", "index", "buffer", "result", "offset", "price", "length", "queue", "score", "weight", "name",
)  # fmt: skip
_CODE = (
    "def get_{0}(x):\n    return x.{0}\n",
    "for i in range({0}):\n    print(i, {0})\n",
    "{0} = [0] * 10\n",
)
_PROSE = (
    "The {} was written down by the clerk.", "Nobody could remember the {} any more.",
    "We talked about the {} all evening.",
)  # fmt: skip
_ANIMALS = (
    "dog", "horse", "bird", "cat", "fish", "sheep", "cow", "goat", "bear", "wolf", "mouse", "fox",
)  # fmt: skip
_TIERE = (
    "Hund", "Esel", "Vogel", "Kater", "Fisch", "Hase", "Ochse", "Bock", "Bär", "Wolf", "Igel", "Fuchs",
)  # fmt: skip
_ENGLISH = ("The {} sleeps under the old tree.", "I saw a {} this morning.", "Our {} is very hungry.")
_GERMAN = ("Der {} schläft unter dem alten Baum.", "Ich sah heute einen {}.", "Unser {} ist sehr hungrig.")

TASKS: dict[str, Task] = {
    "sentiment": _task((_GOOD, _BAD), _THINGS, _THINGS),
    "question": _task((_ASKED, _TOLD), _VERBS, _VERBS),
    "future": _task((_FUTURE, _PAST), _VERBS, _VERBS),
    "code": _task((_CODE, _PROSE), _NAMES, _NAMES),
    "language": _task((_ENGLISH, _GERMAN), _ANIMALS, _TIERE),
}
"""By name: praise or blame, question or statement, future or past, code or prose, English or German."""
