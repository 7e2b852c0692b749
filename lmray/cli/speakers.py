"""Who answers `lmray chat`: an endpoint, or a model in this process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmray.cli.output import say
from lmray.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lmray.engines.base import Engine
    from lmray.models.source import FoundModel
    from lmray.serve.client import Said

Messages = Sequence[Mapping[str, str]]
Answering = Callable[[str, Messages], "Generator[Said, None, None]"]
KEY_VARIABLE = "LMRAY_API_KEY"
MAX_LENGTH = 4096
"""Longest local conversation in tokens, where the model reaches that far."""


@dataclass(frozen=True)
class Speaker:
    """One who answers, under one name of several."""

    name: str
    """Of the model that is asked first."""
    names: Callable[[], list[str]]
    """Those that may be asked."""
    answer: Answering
    """What the model of a name says to a conversation. Closing the generator early cancels it."""


def endpoint(url: str, model: str | None, key_file: Path | None, **sampling: Any) -> Speaker:
    """An OpenAI-compatible endpoint. `sampling`: `max_tokens`, `temperature`. Raises ConfigError for a key that cannot
    be read, RemoteError where no model is named and the endpoint tells of none."""
    from lmray.errors import RemoteError
    from lmray.serve.client import chat_events, list_models

    key = _read_key(key_file)

    def names() -> list[str]:
        return list_models(url, api_key=key)

    first = model or next(iter(names()), None)
    if first is None:
        raise RemoteError(url, "serves no model")
    say(f"{url}: {first}")
    return Speaker(first, names, lambda name, messages: chat_events(url, name, messages, api_key=key, **sampling))


def _read_key(path: Path | None) -> str | None:
    """The key in the file, else in the environment."""
    where = f"API key file {path}" if path is not None else KEY_VARIABLE
    try:
        found = (path.read_text(encoding="utf-8") if path is not None else os.environ.get(KEY_VARIABLE, "")).split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(where, f"cannot be read: {reason}") from None
    if path is not None and not found:
        raise ConfigError(where, "is empty", hint="put the key on its first line")
    if found and not found[0].isascii():
        raise ConfigError(where, "holds no API key", allowed="one of ASCII letters, digits and signs")
    return found[0] if found else None


@contextmanager
def in_process(target: str, **sampling: Any) -> Iterator[Speaker]:
    """The model of `MODEL[:ADAPTER]` on the embedded engine, with a GPU where there is one. `sampling` as above."""
    import torch

    from lmray.engines.native import Native
    from lmray.models.load import load_model, load_tokenizer, stop_token_ids
    from lmray.models.precision import resolve_dtype
    from lmray.models.rope import RopeScaling
    from lmray.models.source import find_model

    source, ref = _split(target)
    found = find_model(source)
    adapter, base = _adapter(ref, found) if ref else (None, {})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, _ = resolve_dtype("auto", device)
    loaded: Any = load_model(found.folder, dtype, rope_scaling=RopeScaling.of(base))
    loaded.to(device)
    tokenizer = load_tokenizer(found.folder)
    config = Native(max_batch_size=1, max_adapters=1, max_length=min(MAX_LENGTH, loaded.config.max_position_embeddings))
    stops = stop_token_ids(loaded, tokenizer)
    engine = config.start(loaded, stop_token_ids=stops, threads=len(os.sched_getaffinity(0)))
    with asyncio.Runner() as runner:
        try:
            if adapter is not None:
                runner.run(engine.add_adapter(ref, adapter))
            say(f"{target}: {found.folder}, {device}")
            local = _Local(engine, tokenizer, source, sampling)
            yield Speaker(ref or source, lambda: [source, *([ref] if ref else [])], local.through(runner))
        finally:
            runner.run(engine.close())


@dataclass(frozen=True)
class _Local:
    """An engine of this process, asked as an endpoint is."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    source: str
    """Its base model; every other name is an adapter's."""
    sampling: Mapping[str, Any]

    def through(self, runner: asyncio.Runner) -> Answering:
        """The engine's answers, one turn of `runner`'s loop after another; Ctrl-C cancels the answer that is made."""

        async def next_of(pieces: AsyncGenerator[Said, None]) -> Said | None:
            return await anext(pieces, None)

        def answer(name: str, messages: Messages) -> Generator[Said, None, None]:
            pieces = self._pieces(name, messages)
            try:
                while (said := runner.run(next_of(pieces))) is not None:
                    yield said
            finally:
                runner.run(pieces.aclose())

        return answer

    async def _pieces(self, name: str, messages: Messages) -> AsyncGenerator[Said, None]:
        from lmray.serve.answer import Answer
        from lmray.serve.client import Said
        from lmray.serve.forms import Chat, engine_requests
        from lmray.serve.openai import ChatRequest, read_request

        body = {"model": name, "messages": [dict(message) for message in messages], **self.sampling}
        form = Chat(read_request(ChatRequest, body), self.tokenizer)
        adapter = None if name == self.source else name
        [(request, _)] = engine_requests(form, adapter, self.engine.capabilities.max_length)
        answer, num_tokens = Answer(self.tokenizer), 0
        async with aclosing(self.engine.submit(request)) as events:
            async for event in events:
                num_tokens += event.token_id is not None
                piece = answer.push(event)
                yield Said(piece.text, piece.finish_reason)
        num_read = len(request.prompt_ids)
        told = {"prompt_tokens": num_read, "completion_tokens": num_tokens, "total_tokens": num_read + num_tokens}
        yield Said(usage=told)


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
