"""A conversation on the wire: OpenAI's messages, functions and calls, and the same as chat templates take them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lmray.serve.json_text import MAX_DEPTH, read_json

T = TypeVar("T")
Items = Annotated[list[T], Field(fail_fast=True)]
"""A list that is read up to the first item that is wrong: one body may hold half a million of them."""


class Wire(BaseModel):
    """A part of a request. What is unknown is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Wire):
    type: Literal["text"]
    text: str


class Function(Wire):
    """A function that a model may call."""

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool | None = None
    """Whether arguments are held to `parameters`; without it the model may get them wrong."""

    @field_validator("parameters")
    @classmethod
    def _are_an_objects(cls, schema: dict[str, Any]) -> dict[str, Any]:
        if schema.get("type", "object") != "object":
            raise ValueError("are no schema of an object")
        return schema


class Tool(Wire):
    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        return self.model_dump(exclude_unset=True, exclude={"function": {"strict"}})


class NamedFunction(Wire):
    name: str


class NamedTool(Wire):
    """The function that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class Called(Wire):
    """A function that was called, its arguments as JSON."""

    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, text: str) -> str:
        if not isinstance(read_json(text, max_depth=MAX_DEPTH), dict):
            raise ValueError("are no JSON object")
        return text


class ToolCall(Wire):
    id: str
    type: Literal["function"] = "function"
    function: Called

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: the arguments as an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


class ChatMessage(Wire):
    """A turn. Fields that are null are read over: clients send an answer back as they got it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """`developer` is OpenAI's newer word for `system`."""
    content: str | Items[TextPart] | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are the assistant's, not of role `{self.role}`")
        if self.tool_call_id and self.role != "tool":
            raise ValueError(f"tool_call_id belongs to role `tool`, not `{self.role}`")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates take it: content as one string."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        calls = {"tool_calls": [call.plain() for call in self.tool_calls]} if self.tool_calls else {}
        answered = {"tool_call_id": self.tool_call_id} if self.tool_call_id else {}
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | calls | answered
