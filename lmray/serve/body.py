"""The body of a request: read no further and waited for no longer than allowed, and JSON in every word."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request

from lmray.config.endpoint import HttpLimits
from lmray.serve.failures import AnswerError, RequestError, error_body
from lmray.serve.json_text import read_json


async def read_body(http: Request, limits: HttpLimits) -> bytes:
    """The body of `http`. Raises AnswerError (413, 408) for one that is too long or too slow."""
    declared = http.headers.get("content-length", "")
    if declared.isascii() and declared.isdecimal():
        _check_length(int(declared[:20]), limits)
    content = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for part in http.stream():
                content += part
                _check_length(len(content), limits)
    except TimeoutError:
        found = f"the body was not there after {limits.body_timeout_s:g} s"
        raise AnswerError(408, error_body(found, code="timeout")) from None
    return bytes(content)


def decode(content: bytes) -> Any:
    """JSON in UTF-8. Raises RequestError for anything else."""
    try:
        return read_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise RequestError(None, f"the body is not JSON: {error}") from None


def _check_length(num_bytes: int, limits: HttpLimits) -> None:
    if num_bytes > limits.max_body_bytes:
        found = f"the body is longer than {limits.max_body_bytes} bytes"
        raise AnswerError(413, error_body(found, code="request_too_large"))
