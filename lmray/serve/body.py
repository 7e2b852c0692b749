"""The body of a request: read no further and waited for no longer than allowed, and JSON in every word."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, NoReturn

from fastapi import Request

from lmray.config.endpoint import HttpLimits
from lmray.serve.failures import AnswerError, RequestError, error_body


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
    """JSON in UTF-8. Raises RequestError for anything else, and for what `json` reads although it is none or says two
    things at once: NaN and infinities, numbers beyond all range, half a character, a name that is given twice."""
    try:
        told = {"object_pairs_hook": _object, "parse_constant": _no_number, "parse_float": _number}
        body = json.loads(content.decode("utf-8-sig"), **told)
        json.dumps(body, ensure_ascii=False).encode()  # JSON can write half a character, which no tokenizer reads
    except (ValueError, RecursionError) as error:
        raise RequestError(None, f"the body is not JSON: {error}") from None
    return body


def _check_length(num_bytes: int, limits: HttpLimits) -> None:
    if num_bytes > limits.max_body_bytes:
        found = f"the body is longer than {limits.max_body_bytes} bytes"
        raise AnswerError(413, error_body(found, code="request_too_large"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"`{name[:100]}` is given twice")
        found[name] = value
    return found


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is beyond all range")
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
