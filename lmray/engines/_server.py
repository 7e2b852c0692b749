"""An OpenAI-compatible server from a client's side: calls, streamed answers, failures as lmray's own errors.

Nothing here knows of engines. All but `models_at` runs on one event loop.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx

from lmray.errors import ArtifactError, CapacityError, ConfigError, DataError, LmrayError, RemoteError

SERVER = "the model's server"
"""Where it is said to be in what clients are told: its address is none of their business."""


@dataclass(frozen=True)
class Address:
    """Where a server is, and how to speak to it."""

    url: str
    """Without `/v1`."""
    api_key: str | None = None
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 300.0
    """Longest silence before an answer and within it."""
    is_own: bool = False
    """Whether the server is this process's own, and no proxy stands before it."""

    @property
    def client_options(self) -> dict[str, Any]:
        return {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {},
            "timeout": httpx.Timeout(self.read_timeout_s, connect=self.connect_timeout_s, pool=None),
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
            "trust_env": not self.is_own,
        }


class Server:
    """Calls to one server."""

    def __init__(self, address: Address):
        self.address = address
        self._client = httpx.AsyncClient(**address.client_options)

    async def choices(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Parts of the answer to a completion, whose first prompt and first answer it has alone. Closing the iterator
        hangs up. Raises what `failure` tells."""
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise refusal(response.status_code, await response.aread(), self.address.url)
                if not body["stream"]:
                    yield json.loads(await response.aread())["choices"][0]
                    return
                async with aclosing(_events(response)) as events:
                    async for event in events:
                        if "error" in event:
                            said = json.dumps({"error": event["error"]}).encode()
                            raise refusal(_code(event["error"]), said, self.address.url)
                        if event["choices"]:
                            yield event["choices"][0]
        except Exception as error:
            raise failure(error, self.address.url) from None

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """Whatever the server answers. Raises RemoteError where it does not."""
        try:
            return await self._client.post(path, json=body)
        except httpx.HTTPError as error:
            raise failure(error, self.address.url) from None

    async def text(self, path: str) -> str | None:
        """The page at `path`; None where there is none."""
        try:
            response = await self._client.get(path)
        except httpx.HTTPError:
            return None
        return response.text if response.status_code == 200 else None

    async def models(self) -> dict[str, dict[str, Any]]:
        """The models of the server, by name. Raises RemoteError."""
        try:
            return _cards(await self._client.get("/v1/models"), self.address.url)
        except Exception as error:
            raise failure(error, self.address.url) from None

    async def close(self) -> None:
        await self._client.aclose()


def models_at(address: Address) -> dict[str, dict[str, Any]]:
    """The models of a server, by name; waits for it. Raises RemoteError."""
    try:
        with httpx.Client(**address.client_options) as client:
            return _cards(client.get("/v1/models", timeout=address.connect_timeout_s), address.url)
    except Exception as error:
        raise failure(error, address.url) from None


def failure(error: Exception, url: str) -> LmrayError:
    """What went wrong with a call, in lmray's words."""
    if isinstance(error, LmrayError):
        return error
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
        return ConfigError("engine.url", f"`{url}` is no address: {error}", hint="like `http://127.0.0.1:8000`")
    if isinstance(error, httpx.HTTPError):
        return RemoteError(url, f"does not answer: {type(error).__name__}: {error}".rstrip(": "))
    if isinstance(error, ValueError | KeyError | IndexError | TypeError | AttributeError):
        return RemoteError(url, f"answers something else than OpenAI's protocol: {type(error).__name__}: {error}")
    return RemoteError(url, f"cannot be asked: {type(error).__name__}: {error}")


def refusal(status: int, content: bytes, url: str) -> LmrayError:
    """What the server said instead of an answer."""
    said = _message(content)
    match status:
        case 400 | 413 | 422:
            return DataError(SERVER, f"refused the request: {said}")
        case 401 | 403:
            return RemoteError(url, f"HTTP {status}: {said}", hint="set `engine.api_key_file`")
        case 404:
            return ArtifactError(SERVER, f"does not know what it was asked for: {said}")
        case 429 | 503:
            return CapacityError(SERVER, f"is busy: {said}", hint="come back in a moment")
    return RemoteError(url, f"HTTP {status}: {said}")


async def _events(response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    """Server-sent events until `[DONE]`. Lines end with a newline alone: texts hold other ends of lines as they are."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            data = line.strip().removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            if line.startswith(b"data:"):
                yield json.loads(data)


def _cards(response: httpx.Response, url: str) -> dict[str, dict[str, Any]]:
    if response.status_code != 200:
        raise refusal(response.status_code, response.content, url)
    return {card["id"]: card for card in response.json()["data"]}


def _code(error: Any) -> int:
    """The HTTP status that an error within an answer stands for."""
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else 500


def _message(content: bytes) -> str:
    """The server's own words: OpenAI's form, FastAPI's, or the text as it is."""
    text = content.decode(errors="replace")
    try:
        said = json.loads(text)
    except ValueError:
        return text[:300] or "nothing"
    error = said.get("error", said.get("detail", said.get("message"))) if isinstance(said, dict) else said
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
