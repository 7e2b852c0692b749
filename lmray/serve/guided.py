"""Answers held to JSON: OpenAI's `response_format` as a grammar, which the engine masks tokens with."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import Field

from lmray.engines._grammar import grammar_fault, json_grammar
from lmray.serve.failures import RequestError
from lmray.serve.messages import Wire

MAX_GRAMMAR = 120_000
"""Characters. One of this length is read in a third of a second."""
MAX_MERGED_PATTERNS = 8
"""Patterns of a schema whose parts are merged. What one text has to match at once doubles the time with each."""
_ALONE = frozenset(("$defs", "definitions", "title", "description", "default", "examples"))
"""What may stand beside a `$ref` without being merged with what it names."""


class JsonSchema(Wire):
    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    schema_: Annotated[dict[str, Any], Field(alias="schema", default_factory=dict)]
    strict: bool | None = None
    """Read over: every answer is held to its schema."""


class ResponseFormat(Wire):
    """What an answer has to be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


def schema_of(wanted: ResponseFormat) -> dict[str, Any] | None:
    """The JSON schema of an answer; None for free text."""
    if wanted.type == "text":
        return None
    return wanted.json_schema.schema_ if wanted.json_schema is not None else {"type": "object"}


def grammar_of(wanted: ResponseFormat) -> str | None:
    """What `llguidance` reads; None for free text."""
    schema = schema_of(wanted)
    return None if schema is None else json_grammar(schema)


def check_format(wanted: ResponseFormat) -> None:
    """Raises RequestError for a schema that is missing, or belongs to nothing."""
    if (wanted.type == "json_schema") != (wanted.json_schema is not None):
        raise RequestError("response_format", "`json_schema` belongs to type `json_schema`, and that needs it")


def check_schema(schema: dict[str, Any], *, where: str) -> None:
    """Raises RequestError, at `where`, for one that could take minutes to read."""
    num_patterns, merges, left = 0, False, [schema]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, dict):
            num_patterns += "pattern" in part
            choices = part.keys() & {"$ref", "anyOf", "oneOf"}
            merges = merges or "allOf" in part or (bool(choices) and len(part.keys() - _ALONE) > 1)
            left += part.values()
    if merges and num_patterns > MAX_MERGED_PATTERNS:
        found = f"merges schemas and holds {num_patterns} patterns"
        raise RequestError(where, found, allowed=f"up to {MAX_MERGED_PATTERNS}, or nothing to merge them with")


def check_grammar(grammar: str | None, *, where: str) -> None:
    """Raises RequestError, at `where`, for what answers cannot be held to; a lenient schema is held to as far as
    possible. Takes a while for large ones."""
    if grammar is None:
        return
    if len(grammar) > MAX_GRAMMAR:
        raise RequestError(where, f"comes to {len(grammar)} characters", allowed=f"up to {MAX_GRAMMAR}")
    if find_spec("llguidance") is None:
        raise RequestError(where, "this endpoint has no guided decoding", hint="install `lmray[guided]` where it runs")
    if (fault := grammar_fault(grammar)) is not None:
        raise RequestError(where, fault)
