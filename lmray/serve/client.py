"""A small client of the endpoint: one chat turn, streamed."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from lmray.errors import RemoteError

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 300.0
PASSING = (408, 409, 425, 429)
"""Statuses of clients' own making that pass by themselves."""


class RefusedError(RemoteError):
    """An endpoint that says that what it was asked is wrong: the same request would be refused again."""

    exit_code = 2


@dataclass(frozen=True)
class Said:
    """What one event adds to an answer."""

    text: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, int] | None = None


def chat_stream(url: str, model: str, messages: Sequence[Mapping[str, str]], **options: Any) -> Iterator[str]:
    """The text of `chat_events`, piece by piece."""
    return (said.text for said in chat_events(url, model, messages, **options))


def chat_events(
    url: str,
    model: str,
    messages: Sequence[Mapping[str, str]],
    *,
    api_key: str | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.0,
) -> Generator[Said, None, None]:
    """The answer of `model` at `url` (with or without `/v1`) to `messages` as it comes; the last event may tell its
    usage. Closing the generator early closes the connection, which cancels the answer.

    Raises RemoteError with what the server said, or that it does not answer; RefusedError where it says that the
    request is wrong.
    """
    body = {"model": model, "messages": list(messages), "stream": True, "temperature": temperature}
    body |= {"stream_options": {"include_usage": True}}
    body |= {"max_tokens": max_tokens} if max_tokens is not None else {}
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    with (
        _answering(url),
        httpx.Client(timeout=timeout) as client,
        client.stream("POST", f"{_root(url)}/v1/chat/completions", json=body, headers=_headers(api_key)) as response,
    ):
        _check(response, url)
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
            if data == "[DONE]":
                return
            if data:
                yield _said(json.loads(data), url)


def list_models(url: str, *, api_key: str | None = None) -> list[str]:
    """Names of the models at `url`. Raises RemoteError as `chat_stream` does."""
    with _answering(url), httpx.Client(timeout=CONNECT_TIMEOUT_S) as client:
        response = client.get(f"{_root(url)}/v1/models", headers=_headers(api_key))
        _check(response, url)
        return [entry["id"] for entry in response.json()["data"]]


@contextmanager
def _answering(url: str) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        hint = "is the endpoint up? `lmray run configs/serve/demo.yaml` starts one"
        raise RemoteError(url, f"does not answer: {error}", hint=hint) from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        hint = "give the address of an OpenAI-compatible endpoint"
        raise RemoteError(url, f"answers something else than OpenAI's protocol: {error}", hint=hint) from None


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _check(response: httpx.Response, url: str) -> None:
    """Raises RemoteError with the server's own words for any status but 200."""
    if response.status_code == 200:
        return
    text = response.read().decode(errors="replace")
    try:
        said = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = text[:200] or "nothing"
    hint = "put an API key into LMRAY_API_KEY or a file" if response.status_code == 401 else None
    kind = RefusedError if 400 <= response.status_code < 500 and response.status_code not in PASSING else RemoteError
    raise kind(url, f"HTTP {response.status_code}: {said}", hint=hint)


def _said(event: dict[str, Any], url: str) -> Said:
    """Raises RemoteError for an event that is an error."""
    if "error" in event:
        raise RemoteError(url, f"the answer broke off: {event['error']['message']}")
    if not event["choices"]:
        return Said(usage=event.get("usage"))
    choice = event["choices"][0]
    return Said(choice["delta"].get("content") or "", choice.get("finish_reason"), event.get("usage"))


def _root(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")
