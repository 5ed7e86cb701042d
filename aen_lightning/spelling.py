"""Words for people: the nearest known one to one that is not known, and text that a terminal can be given."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# controls but for line breaks and tabs, marks that reorder what follows, halves of surrogate pairs
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like this one; None if none is near."""
    return next(iter(difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)), None)


def suggest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known word, or nothing if none is near."""
    near = nearest(word, known)
    return f" (did you mean {near!r}?)" if near else ""


def printable(text: str, *, at_most: int | None = None) -> str:
    """Text from a file or a server that may go to a terminal.

    Escape sequences could recolour, overwrite or retitle what stands there, so control characters become
    their ``\\x1b``, but for line breaks and tabs; and so do the marks that turn the direction of writing.

    Args:
        text: The text.
        at_most: Characters to show, for a message that may repeat what it complains of; None: all.
    """
    shown = _OBEYED.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)
    return shown if at_most is None or len(shown) <= at_most else f"{shown[:at_most]}..."
