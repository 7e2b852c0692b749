"""Tool calls in an answer, in the form most chat templates ask for: `<tool_call>{"name", "arguments"}</tool_call>`.

NousResearch's Hermes function calling, as Qwen's and SmolLM's templates have it; between the tags stands one call or an
array of them.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from lmray.data.detokenise import num_unfinished
from lmray.engines._grammar import FLEXIBLE_SPACE
from lmray.serve.messages import Function

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_OTHER_FORM = "<function="
"""In a template whose calls are XML between the same tags."""


def writes_tool_calls(template: object) -> bool:
    """Whether a chat template asks for calls in the form that `ToolCalls` reads."""
    return isinstance(template, str) and OPEN in template and CLOSE in template and _OTHER_FORM not in template


def call_grammar(functions: Sequence[Function], *, required: bool, several: bool) -> str:
    """A grammar of `llguidance` for answers that call `functions`, their arguments held to their parameters (of those
    that are not strict, as far as possible): a call and nothing else where one is `required`, else text with calls in
    it; one, or `several`."""
    rules = ["%llguidance {}"]
    calls = " | ".join(f"call_{place}" for place in range(len(functions)))
    if required:
        rules += ["start: one" + (' ("\\n" one)*' if several else ""), f"one: {_quoted(OPEN)} ({calls})"]
    else:  # text up to the tag, which no other text has
        rules += [f"start: one{'*' if several else '?'} TEXT", f"one: opening ({calls})"]
        rules += [f"opening[lazy]: TEXT {_quoted(OPEN)}", r"TEXT: /(.|\n)*/"]
    for place, function in enumerate(functions):
        before, after = f'\n{{"name": {json.dumps(function.name, ensure_ascii=False)}, "arguments": ', f"}}\n{CLOSE}"
        guidance = {**FLEXIBLE_SPACE, "lenient": not function.strict}
        held = {"type": "object", **function.parameters, "x-guidance": guidance}
        rules.append(f"call_{place}: {_quoted(before)} %json {json.dumps(held)} {_quoted(after)}")
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}]}, ensure_ascii=False)


def _quoted(text: str) -> str:
    """As a literal of a grammar."""
    return json.dumps(text, ensure_ascii=False)


class ToolCalls:
    """Takes the calls out of an answer, wherever pieces happen to be cut. What is between the tags and is no call stays
    text."""

    def __init__(self, most: int | None = None) -> None:
        """`most`: nothing is read behind so many calls."""
        self.num_calls, self._most = 0, most
        self._held = ""
        self._between = False
        """After a call: the space before what follows says nothing."""

    def push(self, piece: str) -> tuple[str, tuple[dict[str, Any], ...]]:
        """Text and whole calls (as OpenAI's clients take them) up to what may yet turn out to be a call."""
        rest, text, found = self._held + piece, "", []
        if self._between:
            rest = rest.lstrip()
            self._between = not rest
        while True:
            before, opened, after = rest.partition(OPEN)
            content, closed, behind = after.partition(CLOSE)
            if not closed:
                break
            calls = _calls(content)[: None if self._most is None else self._most - self.num_calls - len(found)]
            text += before if calls else before + opened + content + closed
            found += calls
            rest = behind.lstrip() if calls else behind
            self._between = bool(calls) and not rest
            if self.num_calls + len(found) == self._most:
                self.num_calls, self._held = self.num_calls + len(found), ""
                return text, tuple(found)
        num_held = len(opened + after) if opened else num_unfinished(rest, (OPEN,))
        self._held = rest[len(rest) - num_held :]
        self.num_calls += len(found)
        return text + rest[: len(rest) - num_held], tuple(found)

    @property
    def done(self) -> bool:
        """Whether nothing more is read."""
        return self.num_calls == self._most

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _calls(content: str) -> list[dict[str, Any]]:
    """The calls that `content` is; none where it is something else."""
    try:
        value = json.loads(content)
    except ValueError:
        return []
    found = value if isinstance(value, list) else [value]
    return list(_wire(found)) if found and all(map(_is_call, found)) else []


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict)


def _wire(calls: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for call in calls:
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        function = {"name": call["name"], "arguments": arguments}
        yield {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
