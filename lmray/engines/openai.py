"""Any OpenAI-compatible server as an engine: its `/v1/completions` takes prompts as tokens.

The server has the model; here are its tokenizer and its config only. Nobody checks that the server's weights are those
of the job's model: that is in the hands of who runs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from lmray.engines._adapter_folder import read_adapter_folder
from lmray.engines._completions import Dialect, ExactTokens, TextTokens, writes_pieces
from lmray.engines._remote import Remote, RemoteEngine
from lmray.engines._server import Address, Server, models_at
from lmray.engines.base import Capabilities, EngineConfig, Request, check_length
from lmray.errors import ConfigError, did_you_mean


class Openai(EngineConfig):
    """Asks a server that runs elsewhere."""

    needs_weights: ClassVar[bool] = False
    chooses_weights: ClassVar[bool] = False
    decides_nothing: ClassVar[frozenset[str]] = EngineConfig.decides_nothing | {
        "api_key_file",
        "connect_timeout_s",
        "read_timeout_s",
    }
    url: str
    """With or without `/v1`."""
    model: str
    """The base model's name at the server."""
    api_key_file: str | None = None
    """File with the server's key, where the engine runs. Empty: it asks for none."""
    tokens: Literal["ids", "text"] = "ids"
    """How the server tells tokens. `ids`: by vLLM's `return_token_ids`, with which all is as with `native`. `text`: as
    OpenAI's protocol has it; the text is exact, counts of tokens may differ from the server's, and there are no log
    probabilities, no JSON schemas and no prefix caches apart for each key."""
    adapters: str | None = None
    """The name that an adapter has at the server, in whatever version, like `{name}` or `{model}:{name}`; `{version}`
    is the artifact's. Empty: adapters are loaded there by path, with vLLM's calls; the server must see the store."""
    connect_timeout_s: Annotated[float, Field(gt=0.0)] = 10.0
    read_timeout_s: Annotated[float, Field(gt=0.0)] = 300.0
    """Longest silence of the server, before an answer and within it."""

    @field_validator("adapters")
    @classmethod
    def _is_a_template(cls, template: str | None) -> str | None:
        try:
            differs = template is None or template.format(model="m", name="n", version="v") != template.format(
                model="m", name="o", version="v"
            )
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"cannot be filled in: {error}; it may hold {{model}}, {{name}}, {{version}}") from None
        if not differs:
            raise ValueError("names every adapter alike; it must hold {name}")
        return template

    @property
    def has_grammars(self) -> bool:
        return self.tokens == "ids"

    def check(self, model: Any, adapters: Mapping[str, Path]) -> None:
        check_length(model, self.max_length)
        for folder in adapters.values():
            read_adapter_folder(folder, model)

    def start(
        self, model: Any, *, stop_token_ids: tuple[int, ...], threads: int, tokenizer: Any = None
    ) -> RemoteEngine:
        """Raises ConfigError where the server has no such model, or the tokenizer cannot write its text; RemoteError
        where it does not answer."""
        address = Address(
            url=self.url.rstrip("/").removesuffix("/v1"),
            api_key=_read_key(self.api_key_file),
            connect_timeout_s=self.connect_timeout_s,
            read_timeout_s=self.read_timeout_s,
        )
        if self.model not in (there := models_at(address)):
            hint = did_you_mean(self.model, there)
            raise ConfigError(
                "engine.model", f"{address.url} has no `{self.model}`", allowed=", ".join(there), hint=hint
            )
        if self.tokens == "text" and (tokenizer is None or not writes_pieces(tokenizer)):
            found = "the model's tokenizer does not write a text piece by piece as it writes the whole"
            raise ConfigError("engine.tokens", found, allowed="ids")
        dialect = self._dialect(stop_token_ids, tokenizer)
        remote = Remote(self.name, model, self.model, dialect, adapter_name=self.adapters)
        return RemoteEngine(Server(address), remote, self.capabilities(model))

    def capabilities(self, model: Any) -> Capabilities:
        vocab_size = int(model.get_input_embeddings().weight.shape[0])
        sizes = self.max_batch_size, self.max_adapters, self.max_length, vocab_size
        return Capabilities(*sizes, has_grammars=self.has_grammars, exact_tokens=self.tokens == "ids")

    def stamp(self) -> str:
        """Of the key, where its file is on this machine as well."""
        with suppress(ConfigError):
            return hashlib.sha256((_read_key(self.api_key_file) or "").encode()).hexdigest()
        return ""

    def _dialect(self, stop_token_ids: tuple[int, ...], tokenizer: Any) -> Any:
        def exact(request: Request) -> Dialect:
            return ExactTokens(request, stop_token_ids)

        return exact if self.tokens == "ids" else partial(TextTokens, tokenizer=tokenizer)


def _read_key(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        key = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError("engine.api_key_file", f"{path} cannot be read: {error}") from None
    if not key or len(key.split()) != 1:
        raise ConfigError("engine.api_key_file", f"{path} holds no key", allowed="one key and nothing else")
    return key
