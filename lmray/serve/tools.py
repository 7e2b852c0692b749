"""What all forms share in which models write the functions they call: taken out of an answer while it comes, and as a
grammar that answers are held to."""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from typing import Any, ClassVar

from lmray.engines._grammar import FLEXIBLE_SPACE
from lmray.serve.messages import Function

Calls = tuple[dict[str, Any], ...]
"""As OpenAI's clients take them."""


class CallReader(ABC):
    """Takes the calls out of one answer, wherever pieces happen to be cut. What is no call stays text."""

    def __init__(self, names: Collection[str] | None = None, most: int | None = None) -> None:
        """`names`: of the functions there are, where it takes them to tell a call. `most`: nothing is read behind so
        many calls."""
        self.num_calls, self._names, self._most = 0, names, most

    @abstractmethod
    def push(self, piece: str) -> tuple[str, Calls]:
        """Text and whole calls up to what may yet turn out to be a call."""
        raise NotImplementedError

    @abstractmethod
    def finish(self) -> tuple[str, Calls]:
        """What was held back, now that nothing follows."""
        raise NotImplementedError

    @property
    def done(self) -> bool:
        """Whether nothing more is read."""
        return self.num_calls == self._most

    def _taken(self, calls: Iterable[dict[str, Any]]) -> Calls:
        """`calls`, of which no more than are read."""
        room = None if self._most is None else self._most - self.num_calls
        taken = tuple(calls)[:room]
        self.num_calls += len(taken)
        return taken


class CallForm(ABC):
    """A way to write calls."""

    reader: ClassVar[type[CallReader]]
    """Reads one answer."""
    arguments: ClassVar[str] = "arguments"
    """What a call's arguments go by."""

    @abstractmethod
    def is_of(self, template: str) -> bool:
        """Whether a chat template asks for calls in this form."""
        raise NotImplementedError

    @abstractmethod
    def start(self, *, required: bool, several: bool) -> list[str]:
        """Rules of a grammar for answers with a `call` in them: that and nothing else where one is `required`, else
        text or calls; one, or `several`."""
        raise NotImplementedError

    def grammar(self, functions: Sequence[Function], *, required: bool, several: bool) -> str:
        """A grammar of `llguidance` for answers that call `functions`, their arguments held to their parameters (of
        those that are not strict, as far as possible)."""
        rules = ["%llguidance {}", *self.start(required=required, several=several)]
        rules += [f"call: {' | '.join(f'call_{place}' for place in range(len(functions)))}"]
        for place, function in enumerate(functions):
            before = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "{self.arguments}": '
            guidance = {**FLEXIBLE_SPACE, "lenient": not function.strict}
            held = {"type": "object", **function.parameters, "x-guidance": guidance}
            rules.append(f'call_{place}: {quoted(before)} %json {json.dumps(held)} "}}"')
        return json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}]}, ensure_ascii=False)


def quoted(text: str) -> str:
    """As a literal of a grammar."""
    return json.dumps(text, ensure_ascii=False)


def wire(name: str, arguments: dict[str, Any], call_id: str | None = None) -> dict[str, Any]:
    """A call as OpenAI's clients take it."""
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": call_id or f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


DECODER = json.JSONDecoder(parse_constant=_no_number)
"""Of what models write: raises ValueError for what is no JSON, RecursionError for what is nested too deep."""
