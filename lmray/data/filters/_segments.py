"""Text that is searched part by part while it comes, such that no match reaches from one part into the next.

Names, numbers and addresses hold no space, but for numbers in groups (`4111 1111 1111 1111`, `GB29 NWBK 6016 ...`,
`+1 415 555 2671 ext. 5`). So a part ends behind a word; behind one with a digit it goes on up to two words without.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

MAX_LENGTH, MAX_MATCH = 256, 128
"""Characters of a part, and of a match that holds spaces. What is longer than a part is searched where it overlaps."""
_WORD = re.compile(r"(\S*)(\s?)")
_SOFT = frozenset((" ", "\t"))
"""Spaces within a number."""
_NO_SPACES = ((0x0E00, 0x0EFF), (0x2E80, 0x10FFFF))
"""Scripts whose words stand without spaces, as Thai and Japanese: there a number between words would be a part of a
word to most patterns."""
_DASHES = frozenset("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u30fc\uff70")


@dataclass(frozen=True)
class Span:
    """A match in a text."""

    start: int
    end: int
    kind: str


Search = Callable[[str], Sequence[Span]]
"""Matches in a text, in order, none over another."""


def plain(text: str) -> str:
    """`text`, character for character, as patterns for ASCII read it: wide digits and letters as narrow ones, dashes as
    hyphens, and scripts without spaces as ends of lines, which no match holds."""
    return text if text.isascii() else "".join(map(_plain, text))


@lru_cache(maxsize=2**14)
def _plain(char: str) -> str:
    if char in _DASHES:
        return "-"
    narrow = unicodedata.normalize("NFKC", char)
    if len(narrow) == 1 and narrow.isascii():
        return narrow
    return "\n" if any(first <= ord(char) <= last for first, last in _NO_SPACES) else char


class Segments:
    """One text, from which matches are taken out."""

    def __init__(self, search: Search, replace: Callable[[str], str] | None):
        """`replace`: what is put instead of a match of a kind; None: a match ends the text."""
        self.stopped = False
        self._search, self._replace = search, replace
        self._held = ""
        self._inside = False
        """The rest of a word belongs to a match that was longer than a part."""

    def push(self, piece: str, *, last: bool) -> tuple[str, list[str]]:
        """What passes of the text so far, and the kinds of what was found. `last`: nothing follows."""
        text, place, sent, found = self._held + piece, 0, [], []
        read = plain(text)
        while (part := self._next_part(read, place, last=last)) is not None:
            end, spans = part
            for span in spans:
                sent.append(text[place : span.start])
                found.append(span.kind)
                if self._replace is None:
                    self.stopped, self._held = True, ""
                    return "".join(sent), found
                sent.append(self._replace(span.kind))
                place = span.end
            sent.append(text[place:end])
            place = end
            if self._inside:
                place = _word_end(read, place)
                self._inside = place == len(read)
        self._held = text[place:]
        return "".join(sent), found

    def _next_part(self, read: str, place: int, *, last: bool) -> tuple[int, Sequence[Span]] | None:
        """Where the part that begins at `place` ends, and the matches in it; None while more has to come."""
        if place == len(read):
            return None
        if self._inside:
            return place, ()
        if (end := _part_end(read, place, last=last)) is not None:
            return end, self._matches(read, place, end)
        if len(read) - place < MAX_LENGTH:
            return None
        end = cut = place + MAX_LENGTH
        spans = self._matches(read, place, end)
        cut -= MAX_MATCH
        cut = next((span.end for span in spans if span.start < cut < span.end), cut)
        self._inside = cut == end
        return cut, [span for span in spans if span.end <= cut]

    def _matches(self, read: str, place: int, end: int) -> list[Span]:
        return [Span(place + one.start, place + one.end, one.kind) for one in self._search(read[place:end])]


def _part_end(read: str, place: int, *, last: bool) -> int | None:
    """End of the part that begins at `place`; None where it is not there yet, or too long."""
    at, limit, before = place, place + MAX_LENGTH, False
    while (match := _WORD.match(read, at, limit)) is not None and match.group(2):
        word, at = match.group(1), match.end()
        joins = _joins(word) if word else before
        if match.group(2) not in _SOFT or not (joins or before):
            return at
        before = joins
    return len(read) if last and len(read) <= limit else None


def _joins(word: str) -> bool:
    """Whether a number in groups may go on, or begin, with `word`: it holds a digit, or no letter."""
    return any(map(str.isdigit, word)) or not any(map(str.isalpha, word))


def _word_end(read: str, place: int) -> int:
    match = _WORD.match(read, place)
    assert match is not None  # it may be empty
    return match.end(1)
