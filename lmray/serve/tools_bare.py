"""Tool calls that are the whole answer, as JSON: Llama's `{"name", "parameters"}`, Mistral's `[{"name", "arguments"}]`.

What marks them, `<|python_tag|>` or `[TOOL_CALLS]`, is a special token, and no part of an answer's text; small models
leave it out. So an answer that begins like JSON is held back until it ends, and is calls where all of it is, of
functions that there are.
"""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import Collection
from typing import Any

from lmray.serve.tools import DECODER, CallForm, CallReader, Calls, wire

_SPACE = " \t\r\n"
_TEXT = r"TEXT: /[^\s{\[](.|\n)*/"
"""Of a grammar: text that no reader holds back."""


class BareCalls(CallReader):
    """Calls where they are all there is."""

    def __init__(self, names: Collection[str] | None = None, most: int | None = None) -> None:
        super().__init__(names, most)
        self._held = ""
        self._is_json: bool | None = None
        """Whether it begins so; None before it has begun."""

    def push(self, piece: str) -> tuple[str, Calls]:
        self._held += piece
        if self._is_json is None and (begun := self._held.lstrip(_SPACE)):
            self._is_json = begun[0] in "{["
        if self._is_json is not False:
            return "", ()
        text, self._held = self._held, ""
        return text, ()

    def finish(self) -> tuple[str, Calls]:
        held, self._held = self._held, ""
        found = _values(held)
        if not found or not all(map(self._is_call, found)):
            return held, ()
        # Mistral's template takes ids of nine letters and digits only
        return "", self._taken(wire(call["name"], _arguments(call), uuid.uuid4().hex[:9]) for call in found)

    def _is_call(self, value: Any) -> bool:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return False
        return isinstance(_arguments(value), dict) and (self._names is None or value["name"] in self._names)


class Bare(CallForm):
    """What the forms share."""

    reader = BareCalls

    @abstractmethod
    def calls(self, *, several: bool) -> str:
        """A whole answer that is one `call`, or `several`, in a rule of a grammar."""
        raise NotImplementedError

    def start(self, *, required: bool, several: bool) -> list[str]:
        calls = self.calls(several=several)
        return [f"start: {calls}"] if required else [f"start: {calls} | TEXT?", _TEXT]


class Llama(Bare):
    """Of Llama 3.1 to 3.3, for functions of one's own; several stand behind each other."""

    arguments = "parameters"

    def is_of(self, template: str) -> bool:
        return '"parameters": ' in template and "ipython" in template

    def calls(self, *, several: bool) -> str:
        return 'call ("; " call)*' if several else "call"


class Mistral(Bare):
    """Of Mistral's third tokenizer; its later ones write names and arguments apart, which is another form."""

    def is_of(self, template: str) -> bool:
        return "[TOOL_CALLS]" in template and "[ARGS]" not in template

    def calls(self, *, several: bool) -> str:
        return '"[" call (", " call)* "]"' if several else '"[" call "]"'


def _arguments(call: dict[str, Any]) -> Any:
    """Models take one word for the other."""
    return call.get("parameters", call.get("arguments"))


def _values(text: str) -> list[Any]:
    """Of JSON texts behind each other, those of arrays by themselves; none where not all of it is JSON."""
    found: list[Any] = []
    rest = text.strip(_SPACE)
    try:
        while rest:
            value, end = DECODER.raw_decode(rest)
            found += value if isinstance(value, list) else [value]
            rest = rest[end:].lstrip(_SPACE + ";")
    except (ValueError, RecursionError):
        return []
    return found
