"""Conversations as the field writes them: `messages: [{role, content}, ...]`, the last turn the assistant's."""

from __future__ import annotations

from typing import Any

from lmray.data.base import Example, Mapping, Row
from lmray.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


class Messages(Mapping):
    """One column with a list of turns."""

    column: str = "messages"

    def example(self, row: Row) -> Example:
        where = f"{row.where}: column `{self.column}`"
        turns = row.value.get(self.column)
        if not isinstance(turns, list) or not turns:
            found = "is missing" if self.column not in row.value else f"holds {_kind(turns)}"
            raise DataError(where, found, allowed="a list of {role, content}")
        messages = tuple(_turn(turn, f"{where}, turn {index}") for index, turn in enumerate(turns, start=1))
        if messages[-1]["role"] != "assistant":
            raise DataError(
                where, f"ends with a turn of `{messages[-1]['role']}`", allowed="a last turn of `assistant`"
            )
        return Example(messages, row.where, columns=row.value)


def _turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        found = f"role {turn.get('role')!r}" if isinstance(turn, dict) else _kind(turn)
        raise DataError(where, found, allowed="role " + ", ".join(ROLES))
    if not isinstance(turn.get("content"), str):
        raise DataError(where, f"content is {_kind(turn.get('content'))}", allowed="text")
    return {"role": turn["role"], "content": turn["content"]}


def _kind(value: Any) -> str:
    return (
        "nothing"
        if value is None
        else f"a {type(value).__name__}"
        if value or value == 0
        else f"an empty {type(value).__name__}"
    )
