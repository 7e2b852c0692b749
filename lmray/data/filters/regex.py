"""A regular expression that a text must not match."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator

from lmray.data.filters.base import Action, Passage, TextFilter


class Regex(TextFilter):
    """A regular expression, as Python's `re` reads it."""

    pattern: str
    replacement: str | None = None
    """Put instead of each match. Empty: a match ends an answer, and a prompt with one is refused."""
    max_match_length: Annotated[int, Field(ge=1)] = 100
    """Characters. So much of an answer is held back while it is streamed; a longer match may go out in part."""

    @field_validator("pattern")
    @classmethod
    def _is_one(cls, pattern: str) -> str:
        try:
            matches_nothing = re.compile(pattern).match("") is not None
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        if matches_nothing:
            raise ValueError("matches the empty text, and so every text")
        return pattern

    @property
    def takes(self) -> Action:
        return "refuse" if self.replacement is None else "redact"

    def open(self) -> Passage:
        return _Passage(self)


class _Passage:
    """Holds back what may yet turn out to be a match."""

    def __init__(self, wanted: Regex):
        self.stopped = False
        self._matches = re.compile(wanted.pattern).finditer
        self._kind, self._replacement, self._most = wanted.title, wanted.replacement, wanted.max_match_length
        self._text, self._place = "", 0
        """What is held back, and before it what was sent last, which a pattern may look back at."""

    def push(self, piece: str, *, last: bool) -> tuple[str, list[str]]:
        text, place, sent, found = self._text + piece, self._place, [], []
        safe = len(text)
        while match := next((one for one in self._matches(text, place) if one.group()), None):
            grows = len(text) - match.start() < self._most and not last  # it may grow, or be none
            if grows:
                safe = match.start()
                break
            sent.append(text[place : match.start()])
            found.append(self._kind)
            if self._replacement is None:
                self.stopped, self._text, self._place = True, "", 0
                return "".join(sent), found
            sent.append(self._replacement)
            place = match.end()
        if not last:
            safe = min(safe, max(place, len(text) - self._most))
        kept = max(0, safe - self._most)
        self._text, self._place = text[kept:], safe - kept
        return "".join([*sent, text[place:safe]]), found
