"""JSON that came from outside, in every word; and JSON to send, written while others go on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

MAX_DEPTH = 100
"""Lists and objects within one another, in texts that are read again within a request: templates walk through them."""
_PART = 256
"""Items of a list that are written at a time."""


def read_json(text: str, *, max_depth: int | None = None) -> Any:
    """Raises ValueError for what is no JSON, and for what `json` reads although it is none or says two things at once:
    NaN and infinities, numbers beyond all range, half a character, a name that is given twice."""
    told: dict[str, Any] = {"object_pairs_hook": _object, "parse_constant": _no_number, "parse_float": _number}
    try:
        value = json.loads(text, **told)
        json.dumps(value, ensure_ascii=False).encode()  # JSON can write half a character, which no tokenizer reads
    except RecursionError:
        raise ValueError("too deep a recursion of lists and objects") from None
    if max_depth is not None and _is_deeper(value, max_depth):
        raise ValueError(f"more than {max_depth} lists and objects within one another")
    return value


def changed_values(value: Any, change: Callable[[str], str]) -> Any:
    """`value` of JSON with every text in it changed, but for names; and every number that `change` makes another text
    of."""
    if isinstance(value, dict):
        return {name: changed_values(one, change) for name, one in value.items()}
    if isinstance(value, list):
        return [changed_values(one, change) for one in value]
    if isinstance(value, bool) or value is None:
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    return value if (new := change(text)) == text else new


def json_parts(value: Any) -> Iterator[str]:
    """`value` as JSON, a little at a time: another thread, which would wait for `json` to write a long list, has its
    turn in between."""
    if isinstance(value, dict):
        for place, (name, one) in enumerate(value.items()):
            yield ("," if place else "{") + json.dumps(name, ensure_ascii=False) + ":"
            yield from json_parts(one)
        yield "}" if value else "{}"
    elif isinstance(value, list) and any(isinstance(one, dict | list) for one in value[:2]) and len(value) <= _PART:
        for place, one in enumerate(value):
            yield "," if place else "["
            yield from json_parts(one)
        yield "]"
    elif isinstance(value, list):
        yield "["
        for place in range(0, len(value), _PART):
            yield ("," if place else "") + _text(value[place : place + _PART])[1:-1]
        yield "]"
    else:
        yield _text(value)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [inner for one in level if isinstance(one, dict | list) for inner in _items(one)]
        if not level:
            return False
    return any(isinstance(one, dict | list) for one in level)


def _items(one: dict[str, Any] | list[Any]) -> Any:
    return one.values() if isinstance(one, dict) else one


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"`{name[:100]}` is given twice")
        found[name] = value
    return found


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is beyond all range")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
