"""What can be wrong with a request, and how lmray's errors become HTTP statuses with OpenAI's error body."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from typing import Any

from lmray.errors import ArtifactError, CapacityError, DataError, LmrayError, RemoteError

MAX_MESSAGE, MAX_PARAM = 2000, 200
"""Characters."""
MAX_FRAMES = 50
"""Of what failed, in the log: a recursion has a thousand."""
_LOG = logging.getLogger(__name__)


class RequestError(DataError):
    """A request that OpenAI's protocol or this server does not allow; `param` is the field."""

    def __init__(self, param: str | None, found: str, *, allowed: str | None = None, hint: str | None = None):
        super().__init__(param or "request", found, allowed=allowed, hint=hint)
        self.param = param


class AnswerError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None):
        super().__init__(status, body)
        self.status, self.body, self.headers = status, body, headers or {}


def error_body(
    message: str, *, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients expect it. What it quotes of a request is cut where it is very long."""
    short = None if param is None else param[:MAX_PARAM]
    return {"error": {"message": message[:MAX_MESSAGE], "type": kind, "param": short, "code": code}}


def failure_of(error: Exception) -> AnswerError:
    """The status and body for what a program raised; what a client cannot help is logged and told in one word."""
    if isinstance(error, AnswerError):
        return error
    if isinstance(error, DataError):
        return AnswerError(400, error_body(str(error), code="invalid_value", param=getattr(error, "param", None)))
    if isinstance(error, ArtifactError):
        return AnswerError(404, error_body(str(error), code="model_not_found", param="model"))
    if isinstance(error, CapacityError):
        body = error_body(str(error), kind="rate_limit_error", code="overloaded")
        return AnswerError(429, body, {"Retry-After": "1"})
    if isinstance(error, RemoteError):
        return AnswerError(503, error_body(error.found, kind="server_error", code="unavailable"), {"Retry-After": "1"})
    if isinstance(error, LmrayError):
        _LOG.error("a request failed: %s", error)
        return AnswerError(500, error_body(error.found, kind="server_error"))
    frames = "".join(traceback.format_tb(error.__traceback__)[-MAX_FRAMES:])  # without its message, which may quote
    _LOG.error("a request failed: %s\n%s", type(error).__name__, frames)
    return AnswerError(500, error_body("internal error", kind="server_error"))
