"""From lmray's errors to HTTP statuses with OpenAI's error body."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from lmray.errors import ArtifactError, CapacityError, DataError, LmrayError, RemoteError
from lmray.serve.openai import error_body

_LOG = logging.getLogger(__name__)


class AnswerError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None):
        super().__init__(status, body)
        self.status, self.body, self.headers = status, body, headers or {}


def failure_of(error: Exception) -> AnswerError:
    """The status and body for what a program raised; what a client cannot help is logged and told in one word."""
    if isinstance(error, DataError):
        param = getattr(error, "param", None)
        return AnswerError(400, error_body(str(error), kind="invalid_request_error", param=param))
    if isinstance(error, ArtifactError):
        return AnswerError(404, error_body(str(error), kind="invalid_request_error", code="model_not_found"))
    if isinstance(error, CapacityError):
        return AnswerError(
            429, error_body(str(error), kind="rate_limit_error", code="overloaded"), {"Retry-After": "1"}
        )
    if isinstance(error, RemoteError):
        return AnswerError(503, error_body(error.found, kind="server_error", code="unavailable"), {"Retry-After": "1"})
    _LOG.error("a request failed: %s", error)
    found = error.found if isinstance(error, LmrayError) else "internal error"
    return AnswerError(500, error_body(found, kind="server_error"))
