"""Filters of prompts and answers: regular expressions that a job gives. They see text, whatever it was asked with."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lmray.config.endpoint import TextFilter


def refusing(filters: Sequence[TextFilter], prompt: str) -> TextFilter | None:
    """The first of `filters` that `prompt` must not pass."""
    return next((one for one in filters if one.on != "answers" and re.search(one.pattern, prompt)), None)


def of_answers(filters: Sequence[TextFilter]) -> tuple[TextFilter, ...]:
    return tuple(one for one in filters if one.on != "prompts")


class FilteredText:
    """One answer's text on its way out, through one filter after another."""

    def __init__(self, filters: Sequence[TextFilter]):
        self._stages = [_Stage(one) for one in filters]
        self.stopped = False
        """Whether a filter ended the answer."""

    def push(self, piece: str, *, last: bool) -> tuple[str, tuple[str, ...]]:
        """What can be sent of the text so far, and the names of the filters that found something, once a match."""
        found: list[str] = []
        for stage in self._stages:
            piece, num_matches = stage.push(piece, last=last)
            found += [stage.name] * num_matches
            if stage.stopped:
                self.stopped = last = True  # what stands before the match still passes the filters that follow
        return piece, tuple(found)


class _Stage:
    """Holds back what may yet turn out to be a match."""

    def __init__(self, wanted: TextFilter):
        self.name, self.stopped = wanted.name, False
        self._search = re.compile(wanted.pattern).search
        self._replacement, self._most = wanted.replacement, wanted.max_match_length
        self._held = ""

    def push(self, piece: str, *, last: bool) -> tuple[str, int]:
        """What passes, and the number of matches."""
        text, sent, num_matches = self._held + piece, "", 0
        safe = len(text)
        while (match := self._search(text)) is not None and match.group():
            grows = match.end() == len(text) and len(match.group()) < self._most and not last
            if grows:
                safe = match.start()
                break
            sent, num_matches = sent + text[: match.start()], num_matches + 1
            if self._replacement is None:
                self.stopped, self._held = True, ""
                return sent, num_matches
            sent, text = sent + self._replacement, text[match.end() :]
            safe = len(text)
        if not last:
            safe = min(safe, max(0, len(text) - self._most))
        self._held = text[safe:]
        return sent + text[:safe], num_matches
