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


class Part(Wire):
    """A text, or what an assistant said in place of an answer."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _is_of_its_type(self) -> Self:
        other = self.refusal if self.type == "text" else self.text
        if self.said is None or other is not None:
            raise ValueError(f"a part of type `{self.type}` has one field besides, `{self.type}`")
        return self

    @property
    def said(self) -> str | None:
        return self.text if self.type == "text" else self.refusal


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
    content: str | Items[Part] | None = None
    refusal: str | None = None
    """Of the assistant, in place of `content`."""
    name: Annotated[str, Field(max_length=64, pattern=r"^[^\s<|\\/>]+$")] | None = None
    """Who speaks, where several have one role; for chat templates that tell them apart."""
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None
    annotations: list[Any] | None = None
    """What a server noted beside an answer; not read."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.content is None and self.refusal is None and not self.tool_calls:
            raise ValueError("content is missing")
        refuses = self.refusal is not None or any(part.type == "refusal" for part in self._parts)
        if refuses and self.role != "assistant":
            raise ValueError(f"refusals are the assistant's, not of role `{self.role}`")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are the assistant's, not of role `{self.role}`")
        if self.tool_call_id and self.role != "tool":
            raise ValueError(f"tool_call_id belongs to role `tool`, not `{self.role}`")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates take it: content as one string."""
        text = self.content if isinstance(self.content, str) else "".join(part.said or "" for part in self._parts)
        calls = {"tool_calls": [call.plain() for call in self.tool_calls]} if self.tool_calls else {}
        answered = {"tool_call_id": self.tool_call_id} if self.tool_call_id else {}
        named = {"name": self.name} if self.name is not None else {}
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text or self.refusal or ""} | named | calls | answered

    @property
    def _parts(self) -> list[Part]:
        return self.content if isinstance(self.content, list) else []
