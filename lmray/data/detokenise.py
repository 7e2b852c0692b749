"""From tokens to text while they come: whole characters only, cut at stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What a decoder puts for bytes that are no character, or not yet."""
_MAX_HELD = 3
"""Bytes of an unfinished character: UTF-8 has at most four."""
_LONG, _KEPT = 64, 16
"""Tokens decoded together at most, and kept as context when the window moves on."""


class Detokeniser:
    """Text of one answer, piece by piece. The pieces together are `decode` of all tokens."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._window: list[int] = []
        self._num_sent = 0
        self._text = ""

    def push(self, token_id: int) -> str:
        """What `token_id` adds, without the start of a character that later tokens finish."""
        self._window.append(token_id)
        self._text = self._decode(self._window)
        num_held = _num_held(self._text)
        piece = self._take(len(self._text) - num_held)
        if len(self._window) > _LONG:
            self._move_on(num_held)
        return piece

    def _move_on(self, num_held: int) -> None:
        """Leaves the oldest tokens behind, where the end of the text reads the same without them."""
        text = self._decode(self._window[-_KEPT:])
        if _num_held(text) == num_held:
            num_unsent = len(self._text) - self._num_sent
            self._window, self._text, self._num_sent = self._window[-_KEPT:], text, len(text) - num_unsent

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        return self._take(len(self._text))

    def _take(self, end: int) -> str:
        piece = self._text[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        return piece


def _num_held(text: str) -> int:
    """Characters at the end that later tokens may turn into another one."""
    return min(len(text) - len(text.rstrip(REPLACEMENT)), _MAX_HELD)


class StopStrings:
    """Ends a text before the string that is complete first (the longest of those that end together), wherever pieces
    happen to be cut."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """What can be sent of the text so far: nothing that may yet turn out to be a stop string's start."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            _, place = min(found)
            return text[:place]
        num_held = num_unfinished(text, self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


class AnswerText:
    """The text of one answer while its tokens come, and why it ends."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
        self._text, self._stops = Detokeniser(decode), StopStrings(stops)
        self.num_chars = 0
        """What tokens said so far, whether or not it could be sent."""

    def push(self, token_id: int | None, finish_reason: str | None) -> tuple[str, str | None]:
        """What a token adds, and the reason where the text ends with it: `finish_reason`, or `stop` for a stop string.
        Nothing may follow a reason."""
        text = ""
        if token_id is not None:
            said = self._text.push(token_id)
            self.num_chars += len(said)
            text = self._stops.push(said)
        if finish_reason is not None:
            text += self._stops.push(self._text.finish())
        if self._stops.stopped:
            return text, "stop"
        return (text, None) if finish_reason is None else (text + self._stops.finish(), finish_reason)


def num_unfinished(text: str, wanted: Sequence[str]) -> int:
    """Length of the longest end of `text` that one of `wanted` starts with, without being it."""
    longest = max((len(one) - 1 for one in wanted), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(one.startswith(text[-length:]) for one in wanted):
            return length
    return 0
