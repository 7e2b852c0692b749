"""Turns and tools as rows write them, made the one form the rest of lmray knows: `{role, content}` with `tool_calls`.

Two dialects: `role`/`content` (OpenAI, Hugging Face) and `from`/`value` (ShareGPT). Lists may also be JSON text, which
is how CSV and many Parquet files carry them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmray.data.base import Row
from lmray.errors import DataError, did_you_mean

ROLES = ("system", "user", "assistant", "tool")
Turn = dict[str, Any]


@dataclass(frozen=True)
class Dialect:
    """What keys and roles are called in a row."""

    role: str
    content: str
    roles: Mapping[str, str]
    """Role as written -> one of ROLES, or `function_call` for a turn that is nothing but calls in JSON."""


CHAT = Dialect("role", "content", {role: role for role in ROLES})
SHAREGPT = Dialect(
    "from",
    "value",
    {
        "human": "user",
        "gpt": "assistant",
        "system": "system",
        "observation": "tool",
        "function_call": "function_call",
        "user": "user",
        "assistant": "assistant",
        "tool": "tool",
    },
)


def dialect_of(value: Any) -> Dialect:
    """The dialect that a list of turns, or one turn, is written in; CHAT where it cannot be told."""
    first = value[0] if isinstance(value, list) and value else value
    return SHAREGPT if isinstance(first, dict) and "from" in first and "role" not in first else CHAT


def read_column(row: Row, column: str) -> Any:
    """What `column` of `row` holds. Raises DataError with the nearest column where there is none."""
    if column not in row.value:
        hint = did_you_mean(column, row.value)
        allowed = ", ".join(row.value) or "no columns here"
        raise DataError(f"{row.where}: column `{column}`", "is missing", allowed=allowed, hint=hint)
    return row.value[column]


def read_text(row: Row, column: str) -> str:
    """The text in `column` of `row`. Raises DataError naming file, row and column."""
    value = read_column(row, column)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column `{column}`", f"holds {kind(value)}", allowed="text")
    return value


def optional_text(row: Row, column: str | None) -> str:
    """The text in a column that may be missing or empty: then an empty text."""
    return "" if column is None or row.value.get(column) is None else read_text(row, column)


def optional_tools(row: Row, column: str | None) -> tuple[dict[str, Any], ...] | None:
    """The tools in a column that may be missing or empty. Raises DataError where they are no function schemas."""
    value = None if column is None else row.value.get(column)
    where = f"{row.where}: column `{column}`"
    found = parse_list(value, where) if value else []
    if not isinstance(found, list):
        raise DataError(where, f"holds {kind(found)}", allowed="a list of function schemas")
    return tuple(_read_tool(tool, f"{where}, tool {index}") for index, tool in enumerate(found, start=1)) or None


def read_turns(value: Any, where: str, dialect: Dialect = CHAT) -> tuple[Turn, ...]:
    """`value`, a list of turns or its JSON text. Raises DataError naming the turn that is wrong."""
    turns = parse_list(value, where)
    if not isinstance(turns, list) or not turns:
        allowed = f"a list of {{{dialect.role}, {dialect.content}}}"
        raise DataError(where, f"holds {kind(turns)}", allowed=allowed)
    return tuple(_read_turn(turn, f"{where}, turn {index}", dialect) for index, turn in enumerate(turns, start=1))


def check_answered(messages: tuple[Turn, ...], where: str) -> None:
    """Raises DataError where the last turn is not the assistant's."""
    if messages[-1]["role"] != "assistant":
        found = f"ends with a turn of `{messages[-1]['role']}`"
        raise DataError(where, found, allowed="a last turn of `assistant`")


def without_answer(messages: tuple[Turn, ...], where: str) -> tuple[Turn, ...]:
    """`messages` up to the last answer in them. Raises DataError where nothing is asked before it."""
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not asked:
        raise DataError(where, "holds an answer and no question", allowed="a turn of `user` before it")
    return asked


def with_system(messages: tuple[Turn, ...], system: str) -> tuple[Turn, ...]:
    """`messages` after a system turn with the text `system`, unless that is empty or they begin with one."""
    if not system or messages[0]["role"] == "system":
        return messages
    return ({"role": "system", "content": system}, *messages)


def parse_list(value: Any, where: str) -> Any:
    """JSON text of a list or an object as what it says; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(where, f"malformed JSON: {error}", hint="write the list as JSON") from None


def kind(value: Any) -> str:
    """What `value` is, for a message: `nothing`, `an empty list`, `a str`."""
    if value is None:
        return "nothing"
    empty = not value and value != 0
    return f"an empty {type(value).__name__}" if empty else f"a {type(value).__name__}"


def _read_turn(turn: Any, where: str, dialect: Dialect) -> Turn:
    written = turn.get(dialect.role) if isinstance(turn, dict) else None
    role = dialect.roles.get(written) if isinstance(written, str) else None
    if role is None:
        found = f"{dialect.role} {written!r}" if isinstance(turn, dict) else kind(turn)
        hint = did_you_mean(str(written), dialect.roles)
        raise DataError(where, found, allowed=f"{dialect.role} {', '.join(dialect.roles)}", hint=hint)
    content = turn.get(dialect.content)
    if role in ("assistant", "function_call"):
        _check_learnt(turn, where)
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _read_calls(parse_list(content, where), where)}
    calls = turn.get("tool_calls")
    if calls and role != "assistant":
        raise DataError(where, f"a turn of `{role}` calls tools", allowed="tool_calls in a turn of `assistant`")
    read: Turn = {"role": role, "content": "" if calls and content is None else _read_content(content, where)}
    if calls:
        read["tool_calls"] = _read_calls(parse_list(calls, where), where)
    kept = {"tool": ("name", "tool_call_id"), "assistant": ("reasoning_content",)}.get(role, ())
    return read | {key: turn[key] for key in kept if isinstance(turn.get(key), str)}


def _check_learnt(turn: Turn, where: str) -> None:
    """Data may mark an assistant's turn as not to be learnt; all of them are, so such a turn is refused."""
    for key in ("weight", "train"):
        if turn.get(key) in (0, False):
            hint = "end the conversation before it, or leave the mark out"
            raise DataError(
                where, f"is marked `{key}: {turn[key]}`", allowed="assistant turns to learn from", hint=hint
            )


def _read_content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) and content else [content]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) < len(texts):
        raise DataError(where, f"content is {kind(content)}", allowed="text")
    return "".join(strings)


def _read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise DataError(where, "calls no function", allowed="at least one call")
    return [_read_call(call, where) for call in calls]


def _read_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        found = f"the call {str(call)[:60]!r} names no function"
        raise DataError(where, found, allowed='{"name": ..., "arguments": {...}}, or that as JSON text')
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else parse_list(arguments, where)
    if not isinstance(arguments, dict):
        found = f"the arguments of `{function['name']}` are {kind(arguments)}"
        raise DataError(where, found, allowed="an object, or its JSON text")
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _read_tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        found = f"{kind(tool)} without the name of a function" if isinstance(tool, dict) else kind(tool)
        raise DataError(where, found, allowed='{"type": "function", "function": {"name", "parameters"}}')
    return {"type": "function", "function": function}
