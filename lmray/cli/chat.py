"""`lmray chat`: talk to an endpoint, or to a model and an adapter in this process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmray.cli.output import say
from lmray.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from lmray.models.source import FoundModel

Messages = list[dict[str, str]]
Speaker = Callable[[Messages], Iterator[str]]
"""The answer to a conversation, piece by piece."""
MAX_LENGTH = 4096
"""Longest local conversation in tokens, where the model reaches that far."""
Target = Annotated[
    str,
    typer.Argument(metavar="URL|MODEL[:ADAPTER]", help="An endpoint, or a model (`artifact:NAME` too) and an adapter."),
]
Question = Annotated[str | None, typer.Argument(metavar="MESSAGE", help="Ask once. Empty: talk, a line at a time.")]
ServedName = Annotated[str | None, typer.Option(help="Which model of the endpoint. Empty: its first.")]
KeyFile = Annotated[Path | None, typer.Option(help="File with the endpoint's API key.")]


def chat(
    target: Target,
    message: Question = None,
    model: ServedName = None,
    api_key_file: KeyFile = None,
    system: Annotated[str | None, typer.Option(help="A system message put before the conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0: always the likeliest token.")] = 0.0,
) -> None:
    """Talk to a model; answers go to stdout as they come."""
    messages: Messages = [{"role": "system", "content": system}] if system else []
    if target.startswith(("http://", "https://")):
        opened = _remote(target, model, api_key_file, max_tokens, temperature)
    elif model or api_key_file:
        raise ConfigError(f"chat {target}", "--model and --api-key-file are for endpoints", hint="give a URL")
    else:
        opened = _local(target, max_tokens, temperature)
    with opened as speak:
        for question in [message] if message else _typed():
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": _answer(speak, messages)})


def _typed() -> Iterator[str]:
    """Lines from stdin until it ends; empty ones are passed over."""
    if sys.stdin.isatty():
        say("Ctrl-D ends the conversation.")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _answer(speak: Speaker, messages: Messages) -> str:
    pieces = []
    for piece in speak(messages):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print(flush=True)
    return "".join(pieces)


@contextmanager
def _remote(
    url: str, model: str | None, api_key_file: Path | None, max_tokens: int, temperature: float
) -> Iterator[Speaker]:
    from lmray.serve.client import chat_stream, list_models

    key = _read_key(api_key_file)
    name = model or list_models(url, api_key=key)[0]
    say(f"{url}: {name}")
    yield lambda messages: chat_stream(url, name, messages, api_key=key, max_tokens=max_tokens, temperature=temperature)


def _read_key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"API key file {path}", f"cannot be read: {reason}") from None
    if not lines:
        raise ConfigError(f"API key file {path}", "is empty", hint="put the key on its first line")
    return lines[0]


@contextmanager
def _local(target: str, max_tokens: int, temperature: float) -> Iterator[Speaker]:
    """The model in this process, on the embedded engine."""
    import os

    from lmray.engines.native import Native
    from lmray.models.load import load_model, load_tokenizer, stop_token_ids
    from lmray.models.precision import resolve_dtype
    from lmray.models.rope import RopeScaling
    from lmray.models.source import find_model
    from lmray.serve.answer import Answer
    from lmray.serve.forms import Chat, engine_requests
    from lmray.serve.messages import ChatMessage
    from lmray.serve.openai import ChatRequest

    source, ref = _split(target)
    found = find_model(source)
    adapter, base = _adapter(ref, found) if ref else (None, {})
    dtype, _ = resolve_dtype("auto", "cpu")
    loaded, tokenizer = load_model(found.folder, dtype, rope_scaling=RopeScaling.of(base)), load_tokenizer(found.folder)
    config = Native(max_batch_size=1, max_adapters=1, max_length=min(MAX_LENGTH, loaded.config.max_position_embeddings))
    stops = stop_token_ids(loaded, tokenizer)
    engine = config.start(loaded, stop_token_ids=stops, threads=len(os.sched_getaffinity(0)))
    handle = ref or None

    async def pieces(messages: Messages) -> AsyncIterator[str]:
        asked = [ChatMessage.model_validate(message) for message in messages]
        chat = ChatRequest(model=source, messages=asked, max_tokens=max_tokens, temperature=temperature)
        answer = Answer(tokenizer)
        [(request, _)] = engine_requests(Chat(chat, tokenizer), handle, config.max_length)
        async for event in engine.submit(request):
            yield answer.push(event).text

    loop = asyncio.new_event_loop()
    try:
        if adapter is not None:
            loop.run_until_complete(engine.add_adapter(ref, adapter))
        say(f"{target}: {found.folder}")
        yield lambda messages: _stepped(loop, pieces(messages))
    finally:
        loop.run_until_complete(engine.close())
        loop.close()


def _split(target: str) -> tuple[str, str]:
    """Model and adapter of `MODEL[:ADAPTER]`, where the model may be a folder, `artifact:NAME` or `pypi:PACKAGE`."""
    if Path(target).exists():
        return target, ""
    prefix = next((one for one in ("artifact:", "pypi:") if target.startswith(one)), "")
    source, _, ref = target.removeprefix(prefix).partition(":")
    return prefix + source, ref


def _adapter(ref: str, base: FoundModel) -> tuple[Path, Mapping[str, Any]]:
    """The files of artifact `ref`, and its entry of its base. Raises ArtifactError where it was trained on another
    model."""
    from lmray.artifacts.artifact import Artifacts
    from lmray.artifacts.store import open_store

    kept = Artifacts(open_store())
    artifact = kept.find(ref)
    if artifact.kind != "adapter":
        hint = f"lmray chat artifact:{ref}"
        raise ArtifactError(f"artifact `{artifact.ref}`", f"is a {artifact.kind}", allowed="adapter", hint=hint)
    if artifact.base.get("digest") != base.digest:
        was = f"was trained on `{artifact.base.get('source')}`"
        hint = f"lmray chat {artifact.base.get('source')}:{ref}"
        raise ArtifactError(f"artifact `{artifact.ref}`", was, allowed=f"adapters of `{base.source}`", hint=hint)
    return kept.checkout(artifact), artifact.base


def _stepped(loop: asyncio.AbstractEventLoop, pieces: AsyncIterator[str]) -> Iterator[str]:
    """What `pieces` yields, one turn of the loop after another."""
    try:
        while True:
            try:
                yield loop.run_until_complete(anext(pieces))
            except StopAsyncIteration:
                return
    finally:
        loop.run_until_complete(pieces.aclose())  # type: ignore[attr-defined]  # it is an async generator
