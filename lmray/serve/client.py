"""A small client of the endpoint: one chat turn, streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from lmray.errors import RemoteError

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 300.0


def chat_stream(
    url: str,
    model: str,
    messages: Sequence[Mapping[str, str]],
    *,
    api_key: str | None = None,
    max_tokens: int | None = None,
    temperature: float = 0.0,
) -> Iterator[str]:
    """The answer of `model` at `url` (with or without `/v1`) to `messages`, piece by piece.

    Raises RemoteError with what the server said, or that it does not answer.
    """
    body = {"model": model, "messages": list(messages), "stream": True, "temperature": temperature}
    body |= {"max_tokens": max_tokens} if max_tokens is not None else {}
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    with (
        _answering(url),
        httpx.Client(timeout=timeout) as client,
        client.stream("POST", f"{_root(url)}/v1/chat/completions", json=body, headers=_headers(api_key)) as response,
    ):
        _check(response, url)
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield _text(json.loads(line.removeprefix("data: ")), url)


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
    hint = "give an API key" if response.status_code == 401 else None
    raise RemoteError(url, f"HTTP {response.status_code}: {said}", hint=hint)


def _text(event: dict[str, Any], url: str) -> str:
    """The text of one streamed event. Raises RemoteError for an event that is an error."""
    if "error" in event:
        raise RemoteError(url, f"the answer broke off: {event['error']['message']}")
    return event["choices"][0]["delta"].get("content", "") if event["choices"] else ""


def _root(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")
