"""What a source's rows are, told from the first of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lmray.data.base import Mapping, Row
from lmray.data.mappings.alpaca import Alpaca
from lmray.data.mappings.columns import Columns
from lmray.data.mappings.lmflow import KNOWN, Lmflow
from lmray.data.mappings.messages import Messages
from lmray.data.mappings.preference import Preference, label_of
from lmray.data.mappings.sharegpt import Sharegpt
from lmray.data.mappings.text import Text
from lmray.data.turns import SHAREGPT, dialect_of, parse_list
from lmray.errors import DataError

NUM_ROWS = 20
"""Rows that are looked at before the first is read."""
COLUMNS = ("messages", "conversations", "instruction", "output", "prompt", "completion", "chosen", "rejected", "text")
ASKED = "`messages`, `conversations`, `instruction`, `prompt`, or `text`"
ALLOWED = "`messages`, `conversations`, `instruction`+`output`, `prompt`+`completion`, `chosen`+`rejected`, or `text`"


@dataclass(frozen=True)
class Reading:
    """The mapping that fits the first rows best, and the names of others that would fit all of them."""

    mapping: Mapping
    also: tuple[str, ...] = ()


def detect(head: Sequence[Row], *, answered: bool = True) -> Reading:
    """How to read the source whose first rows are `head` (at least one); without `answered` they may be questions
    alone. Raises DataError where no mapping fits, or the rows are not all alike, naming the first that differs."""
    first = _readings(head[0], answered)
    if not first:
        found = f"columns {', '.join(head[0].value) or 'none'}"
        raise DataError(head[0].where, found, allowed=ALLOWED if answered else ASKED, hint=_hint(head[0], answered))
    for row in head[1:]:
        check_alike(row, first[0], answered=answered)
    also = dict.fromkeys(one.name for one in first[1:] if all(one in _readings(row, answered) for row in head))
    return Reading(first[0], tuple(also))


def check_alike(row: Row, mapping: Mapping, *, answered: bool = True) -> None:
    """Raises DataError where `row` is in another format than `mapping` reads. What fits none is left to `mapping`,
    which knows what it misses."""
    found = _readings(row, answered)
    if found and mapping not in found:
        what = f"is in the format `{found[0].name}`, the rows before it in `{mapping.name}`"
        hint = "give each format a file and a source of its own, or say `mapping:`"
        raise DataError(row.where, what, hint=hint)


def _readings(row: Row, answered: bool) -> tuple[Mapping, ...]:
    """All mappings that fit the columns of `row`, the most telling first."""
    return tuple(_fitting({column: value for column, value in row.value.items() if value is not None}, answered))


def _fitting(value: dict[str, Any], answered: bool) -> Iterator[Mapping]:
    if value.get("type") in KNOWN and value.keys() & {"text", "input", "messages", "chosen", "prompt"}:
        yield Lmflow()
    asked = None
    if {"chosen", "rejected"} <= value.keys():
        preference = _preference(value)
        asked = preference.prompt
        yield preference
    elif {"prompt", "completion", "label"} <= value.keys() and label_of(value["label"]) is not None:
        yield Preference()
    for column in ("messages", "conversations"):
        if column in value and column != asked:
            turns = _is_sharegpt(value[column])
            yield Sharegpt(conversations=column) if turns else Messages(column=column)
    if "instruction" in value and ("output" in value or not answered):
        yield Alpaca()
    if "prompt" in value and ("completion" in value or not answered):
        yield Columns()
    if isinstance(value.get("text"), str):
        yield Text()


def _preference(value: dict[str, Any]) -> Preference:
    for column in ("prompt", "conversations", "messages"):
        if column in value:
            return Preference(prompt=column)
    return Preference(prompt="instruction", input="input") if "instruction" in value else Preference()


def _is_sharegpt(turns: Any) -> bool:
    try:
        return dialect_of(parse_list(turns, "")) is SHAREGPT
    except DataError:  # the mapping says what is wrong, with the place
        return False


def _hint(row: Row, answered: bool) -> str:
    """The nearest column that lmray knows, beside how to say what the columns are."""
    columns = "prompt: COLUMN, completion: COLUMN" if answered else "prompt: COLUMN"
    say = f"say which columns: `mapping: {{{columns}}}`"
    near = [(column, get_close_matches(column, COLUMNS, n=1, cutoff=0.75)) for column in row.value]
    named = [f"column `{column}`: did you mean `{known[0]}`?" for column, known in near if known and known[0] != column]
    return "; ".join([*named[:2], say])
