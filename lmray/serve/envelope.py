"""Around every HTTP request: its id, its account, and an answer for whatever goes wrong."""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lmray.errors import LmrayError
from lmray.serve.account import Account
from lmray.serve.disconnect import ClientGoneError
from lmray.serve.failures import AnswerError, error_body, failure_of
from lmray.serve.metrics import Metrics

CLIENT_CLOSED = 499
"""Nobody reads it; logs and metrics show that the client left."""
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}")
Send = Callable[[Any], Awaitable[None]]


class Envelope:
    """ASGI middleware."""

    def __init__(self, app: Any, *, metrics: Metrics, sends_request_id: bool):
        self._app, self._metrics, self._sends_request_id = app, metrics, sends_request_id

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        account = Account(self._metrics, request_id)
        scope.setdefault("state", {})["account"] = account
        sending = self._sending(send, account)
        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            gone, begun = _has_left(error), account.status
            if gone or begun:
                account.status = CLIENT_CLOSED if gone else failure_of(error).status
            if begun and not gone:  # the head is out: all that is left is to end the connection
                raise
            if not begun and not gone:
                await answer_failure(Request(scope), error)(scope, receive, sending)
        finally:
            await account.close()

    def _sending(self, send: Send, account: Account) -> Send:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                account.status = account.status or message["status"]
                if self._sends_request_id:
                    message["headers"] = [*message["headers"], (b"x-request-id", account.request_id.encode())]
            await send(message)

        return sending


def _has_left(error: BaseException | None) -> bool:
    """Whether `error`, or what it came of, is a client that left."""
    return error is not None and (isinstance(error, ClientGoneError | ClientDisconnect) or _has_left(error.__cause__))


def answer_failure(http: Request, error: Exception) -> Response:
    if isinstance(error, ClientGoneError):
        return Response(status_code=CLIENT_CLOSED)
    if isinstance(error, HTTPException):
        found = f"{http.method} {http.url.path}: {error.detail}"
        return JSONResponse(error_body(found), error.status_code, headers=error.headers)
    failure = failure_of(error)
    return JSONResponse(failure.body, failure.status, headers=dict(failure.headers))


def answer_failures(app: FastAPI, **envelope: Any) -> None:
    """Puts an `Envelope` of these arguments around `app`, and OpenAI's body into all its errors."""

    async def answer(http: Request, error: Exception) -> Response:
        return answer_failure(http, error)

    for kind in (LmrayError, AnswerError, HTTPException, ClientGoneError):
        app.add_exception_handler(kind, answer)
    app.add_middleware(Envelope, **envelope)
