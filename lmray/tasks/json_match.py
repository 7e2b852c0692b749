"""JSON answers: right where every value is one that counts as right.

An example may carry accepted values in the Berkeley Function Calling form: `{"name": NAME, "arguments": {PARAMETER:
[VALUE, ...]}}`, any value of a list counts, `""` in it, or no value at all, means the parameter may be left out.
Without, the answer itself is the one accepted value. Numbers compare by value; text is compared without case, spaces
and the punctuation `,./-_*^` and quotes, as the leaderboard does it. Differs from the leaderboard in: an integer is
accepted where it says a float.
"""

from __future__ import annotations

import json
import re
from typing import Any

from lmray.data.base import Example
from lmray.tasks.base import Task


class JsonMatch(Task):
    """`eval.json_match`: all of it; `eval.json_name_match`: it is JSON and names the right function."""

    needs = "answers"

    def score(self, example: Example, answer: str) -> dict[str, float]:
        found = _parsed(answer)
        if example.accepted is None:
            return {"json_match": float(found is not None and _equal(found, _parsed(example.answer)))}
        named = isinstance(found, dict) and found.get("name") == example.accepted["name"]
        right = named and _accepts(example.accepted["arguments"], found.get("arguments"))
        return {"json_match": float(right), "json_name_match": float(named)}


def _parsed(answer: str) -> Any:
    try:
        return json.loads(answer.strip())
    except ValueError:
        return None


def _accepts(accepted: dict[str, list[Any]], found: Any) -> bool:
    if not isinstance(found, dict) or not found.keys() <= accepted.keys():
        return False
    return all(
        any(_value_accepted(value, found[key]) for value in values) if key in found else "" in values or not values
        for key, values in accepted.items()
    )


def _value_accepted(value: Any, found: Any) -> bool:
    """Inside an accepted value, an object's own values are lists of what counts as right."""
    if isinstance(value, dict):
        return _accepts(value, found)
    if isinstance(value, list):
        same_length = isinstance(found, list) and len(found) == len(value)
        return same_length and all(_value_accepted(*pair) for pair in zip(value, found, strict=True))
    return _equal(value, found)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        return _standard(one) == _standard(other)
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_equal(*pair) for pair in zip(one, other, strict=True))
    return one == other


def _standard(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
