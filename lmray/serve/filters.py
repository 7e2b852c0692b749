"""Filters of texts: what a job lets neither in nor out. They see text, whatever it was asked with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lmray.data.filters.base import Found, TextFilter
from lmray.serve.json_text import changed_values


def of_prompts(filters: Sequence[TextFilter]) -> tuple[TextFilter, ...]:
    return tuple(one for one in filters if one.on != "answers")


def of_answers(filters: Sequence[TextFilter]) -> tuple[TextFilter, ...]:
    return tuple(one for one in filters if one.on != "prompts")


class FilteredText:
    """One text on its way through one filter after another."""

    def __init__(self, filters: Sequence[TextFilter]):
        self._filters = tuple(filters)
        self._ways = [one.open() for one in filters]
        self.stopped = False
        """Whether a filter ended the text."""

    def push(self, piece: str, *, last: bool) -> tuple[str, tuple[Found, ...]]:
        """What can be sent of the text so far, and what the filters found, once a match."""
        found: list[Found] = []
        for one, way in zip(self._filters, self._ways, strict=True):
            piece, kinds = way.push(piece, last=last)
            found += [Found(one.title, kind, one.takes) for kind in kinds]
            if way.stopped:
                self.stopped = last = True  # what stands before the match still passes the filters that follow
        return piece, tuple(found)


def filtered_call(
    call: dict[str, Any], filters: Sequence[TextFilter]
) -> tuple[dict[str, Any] | None, tuple[Found, ...]]:
    """A tool call as OpenAI's clients take it, each text and number among its arguments filtered as it reads, not as
    JSON escapes it; None where a filter ends one."""
    found: list[Found] = []
    stopped = False

    def change(text: str) -> str:
        nonlocal stopped
        way = FilteredText(filters)
        passed, matches = way.push(text, last=True)
        found.extend(matches)
        stopped = stopped or way.stopped
        return passed

    function = call["function"]
    arguments = changed_values(json.loads(function["arguments"]), change)
    if not found:
        return call, ()
    passed = {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}
    return (None if stopped else passed), tuple(found)
