"""Answers held to JSON: OpenAI's `response_format` as a grammar, which the engine masks tokens with."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import Field

from lmray.engines._grammar import grammar_fault, json_grammar
from lmray.serve.failures import RequestError
from lmray.serve.messages import Wire


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
    """Raises RequestError for a schema that is missing, none, or says what answers cannot be held to."""
    where = "response_format"
    if (wanted.type == "json_schema") != (wanted.json_schema is not None):
        raise RequestError(where, "`json_schema` belongs to type `json_schema`, and that needs it")
    grammar = grammar_of(wanted)
    if grammar is None:
        return
    if find_spec("llguidance") is None:
        raise RequestError(where, "this endpoint has no guided decoding", hint="install `lmray[guided]` where it runs")
    fault = grammar_fault(grammar)
    if fault is not None:
        raise RequestError(f"{where}.json_schema.schema", fault)
