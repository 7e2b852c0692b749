"""The OpenAPI document of an endpoint: what `lmray.serve.openai` reads and `lmray.serve.replies` tells."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from lmray.serve.messages import ChatMessage
from lmray.serve.openai import NEUTRAL, NO_EFFECT, ChatRequest, CompletionRequest
from lmray.serve.replies import Alive, ChatReply, CompletionReply, ErrorReply, ModelCard, ModelList, Ready

_REQUESTS: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest)
_REPLIES: tuple[type[BaseModel], ...] = (ChatReply, CompletionReply, ErrorReply, ModelCard, ModelList, Alive, Ready)
_ERRORS = {
    400: "A field is wrong; `param` names it.",
    401: "No API key, or a wrong one.",
    403: "The key may not do this.",
    404: "No such model.",
    408: "The body did not come in time.",
    413: "The body is too long.",
    429: "The key has used what it may, or too many requests are waiting.",
    500: "The server failed.",
    503: "No replica answers.",
    504: "The answer took too long.",
}
_LATER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
_ASKING, _LISTING = (400, 401, 403, 404, 408, 413, 429, 500, 503, 504), (401, 429, 500, 503)


def openapi_document(*, version: str, has_keys: bool) -> dict[str, Any]:
    """The document of an endpoint that asks for a key, or does not."""
    security: dict[str, Any] = {"security": [{"key": []}]} if has_keys else {}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    metrics = {"description": "The counts.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    paths: dict[str, Any] = {
        "/v1/chat/completions": {"post": {**_asks(ChatRequest, ChatReply), **security}},
        "/v1/completions": {"post": {**_asks(CompletionRequest, CompletionReply), **security}},
        "/v1/models": {"get": {**_tells("Models that may be asked.", ModelList, _LISTING), **security}},
        "/v1/models/{name}": {
            "get": {**_tells("One model.", ModelCard, (*_LISTING, 403, 404)), "parameters": [name], **security}
        },
        "/health": {"get": _tells("Whether the gateway runs.", Alive, ())},
        "/ready": {"get": _tells("Whether requests are answered.", Ready, (429, 500, 503))},
        "/metrics": {
            "get": {
                "summary": "Counts for Prometheus.",
                "responses": {"200": metrics} | {str(code): _error(code) for code in (401, 403)},
                **security,
            }
        },
    }
    components: dict[str, Any] = {"schemas": _schemas()}
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    info = {"title": "lmray endpoint", "version": version}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _asks(request: type[BaseModel], reply: type[BaseModel]) -> dict[str, Any]:
    told = _tells((request.__doc__ or "").splitlines()[0], reply, _ASKING)
    events = {"type": "string", "description": "Server-sent events, where `stream` is true; the last one is `[DONE]`."}
    told["responses"]["200"]["content"]["text/event-stream"] = {"schema": events}
    return {**told, "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(request)}}}}


def _tells(summary: str, reply: type[BaseModel], errors: tuple[int, ...]) -> dict[str, Any]:
    done = {"description": "Done.", "content": {"application/json": {"schema": _ref(reply)}}}
    return {"summary": summary, "responses": {"200": done} | {str(code): _error(code) for code in sorted(errors)}}


def _error(code: int) -> dict[str, Any]:
    told = {"description": _ERRORS[code], "content": {"application/json": {"schema": _ref(ErrorReply)}}}
    return told | ({"headers": _LATER} if code in (429, 503) else {})


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _schemas() -> dict[str, Any]:
    wanted: Any = [(model, "validation") for model in (*_REQUESTS, *_REPLIES)]
    _, told = models_json_schema(wanted, ref_template="#/components/schemas/{model}")
    schemas = told["$defs"]
    for model in (*_REQUESTS, ChatMessage):
        _let_nulls_in(schemas[model.__name__])
    for request in _REQUESTS:
        also = {field: {"enum": [*values, None]} for field, values in NEUTRAL.items()}
        schemas[request.__name__]["properties"] |= also | {field: {} for field in sorted(NO_EFFECT)}
    return schemas


def _let_nulls_in(schema: dict[str, Any]) -> None:
    """Null stands for a field that is left out, also for one that we do not know."""
    for field, told in schema["properties"].items():
        if field not in schema["required"] and {"type": "null"} not in told.get("anyOf", ()):
            schema["properties"][field] = {"anyOf": [told, {"type": "null"}]}
    schema["additionalProperties"] = {"type": "null"}
