"""Tool calls between tags: `<tool_call>{"name", "arguments"}</tool_call>`.

NousResearch's Hermes function calling, as Qwen's and SmolLM's templates have it; between the tags stands one call or an
array of them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lmray.data.detokenise import num_unfinished
from lmray.serve.tools import DECODER, CallForm, CallReader, Calls, quoted, wire

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_OTHER_FORM = "<function="
"""In a template whose calls are XML between the same tags."""


class TaggedCalls(CallReader):
    """Calls wherever they stand in a text; what is between the tags and is no call stays text."""

    def __init__(self, names: Collection[str] | None = None, most: int | None = None) -> None:
        super().__init__(names, most)
        self._held = ""
        self._between = False
        """After a call: the space before what follows says nothing."""

    def push(self, piece: str) -> tuple[str, Calls]:
        rest, text, found = self._held + piece, "", ()
        if self._between:
            rest = rest.lstrip()
            self._between = not rest
        while True:
            before, opened, after = rest.partition(OPEN)
            content, closed, behind = after.partition(CLOSE)
            if not closed:
                break
            calls = self._taken(_calls(content))
            text += before if calls else before + opened + content + closed
            found += calls
            rest = behind.lstrip() if calls else behind
            self._between = bool(calls) and not rest
            if self.done:
                self._held = ""
                return text, found
        num_held = len(opened + after) if opened else num_unfinished(rest, (OPEN,))
        self._held = rest[len(rest) - num_held :]
        return text + rest[: len(rest) - num_held], found

    def finish(self) -> tuple[str, Calls]:
        held, self._held = self._held, ""
        return held, ()


class Tagged(CallForm):
    reader = TaggedCalls

    def is_of(self, template: str) -> bool:
        return OPEN in template and CLOSE in template and _OTHER_FORM not in template

    def start(self, *, required: bool, several: bool) -> list[str]:
        content, closing = r'"\n" call "\n"', quoted(CLOSE)
        if required:
            more = r' ("\n" one)*' if several else ""
            return [f"start: one{more}", f"one: {quoted(OPEN)} {content} {closing}"]
        return [  # text up to the tag, which no other text has
            f"start: one{'*' if several else '?'} TEXT",
            f"one: opening {content} {closing}",
            f"opening[lazy]: TEXT {quoted(OPEN)}",
            r"TEXT: /(.|\n)*/",
        ]


def _calls(content: str) -> Calls:
    """The calls that `content` is; none where it is something else."""
    try:
        value = DECODER.decode(content.strip())
    except (ValueError, RecursionError):
        return ()
    found = value if isinstance(value, list) else [value]
    if not all(map(_is_call, found)):
        return ()
    return tuple(wire(call["name"], call["arguments"]) for call in found)


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict)
