"""The engine interface: token ids in, token ids out, asynchronous. Templates, stop strings and keys stay above it.

An engine is made by its config (`EngineConfig.start`) and owns one base model and any number of adapters on it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field

from lmray.config import MemberConfig
from lmray.errors import ArtifactError, CapacityError, ConfigError, DataError, did_you_mean
from lmray.models.rope import num_positions
from lmray.models.spec import ModelSpec

FinishReason = Literal["stop", "length"]
MIN_TEMPERATURE = 1e-4
"""Below it a draw is greedy in all but name, and logits divided by it leave the range of numbers."""
REPETITION_PENALTIES = (0.01, 100.0)
"""Beyond these, penalised logits leave the range of numbers."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises DataError for a value outside its range."""

    max_tokens: int
    """0: the prompt is read and nothing is drawn."""
    temperature: float = 0.0
    """0 is greedy; else `MIN_TEMPERATURE` or more."""
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    """Least probability of a token that may be drawn, as a share of the likeliest token's."""
    seed: int | None = None
    """Equal seeds give equal draws; empty: another draw each time."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens in prompt and answer, and multiplies the negative ones."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time it is in the answer."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens in the answer, once."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens and what is added to their logits."""
    logprobs: int | None = None
    """So many likeliest tokens are told with each token's log probability; empty: none is told."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    grammar: str | None = None
    """What the answer must match: a grammar of `llguidance` as text."""

    def __post_init__(self) -> None:
        least, most = REPETITION_PENALTIES
        ranges = {
            "max_tokens": (self.max_tokens >= 0, "0 or more"),
            "temperature": (
                self.temperature == 0.0 or MIN_TEMPERATURE <= self.temperature < float("inf"),
                f"0, or {MIN_TEMPERATURE:g} or more",
            ),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            "top_k": (self.top_k >= 0, "0 (no limit) or more"),
            "min_p": (0.0 <= self.min_p <= 1.0, "0 to 1"),
            "repetition_penalty": (
                least <= self.repetition_penalty <= most,
                f"{least:g} to {most:g}; 1 changes nothing",
            ),
            "frequency_penalty": (abs(self.frequency_penalty) < float("inf"), "a finite number"),
            "presence_penalty": (abs(self.presence_penalty) < float("inf"), "a finite number"),
            "logprobs": ((self.logprobs or 0) >= 0, "0 or more"),
            "prompt_logprobs": ((self.prompt_logprobs or 0) >= 0, "0 or more"),
        }
        for name, (fits, allowed) in ranges.items():
            if not fits:
                raise DataError(name, f"is {getattr(self, name)}", allowed=allowed)


@dataclass(frozen=True)
class Request:
    """One sequence to continue."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    adapter: str | None = None
    """Handle of an adapter added before; None is the base model."""
    cache_salt: str = ""
    """Only requests of one salt share keys and values of a common beginning, such as those of one tenant."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability in the model's own distribution: before temperature, penalties, bias and grammar."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens of this place with theirs, likeliest first."""


@dataclass(frozen=True)
class TokenEvent:
    """One generated token. The last event of a request carries `finish_reason`; a stop token itself is not sent, so
    an event that ends a request may have no token."""

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
    """Where the request asked for it; of a stop token too."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """With a request's first event, where it asked for them: one a token of the prompt, None for the first."""
    prefill_s: float | None = field(default=None, compare=False)
    """With a request's first event: time since the engine began to read the prompt."""
    after_s: float | None = field(default=None, compare=False)
    """With the others, where a replica tells it: time since the one before, whenever both are sent on."""
    version: str | None = field(default=None, compare=False)
    """With a request's first event, where a replica tells it: its model, `NAME@VERSION` of an artifact."""


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do, for those who route to it."""

    max_batch_size: int
    max_adapters: int
    max_length: int
    """Longest sequence, prompt and answer together, in tokens."""
    vocab_size: int
    has_grammars: bool = False
    """Whether answers can be held to a grammar."""
    exact_tokens: bool = True
    """Whether tokens are those that the model drew. Otherwise its text is exact, but not in how many tokens it is told,
    and there are no log probabilities."""


class Engine(Protocol):
    """A running engine. All methods are called on one event loop; the work happens elsewhere."""

    capabilities: Capabilities

    def submit(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Queues `request` and yields its tokens as they come. Closing the generator early cancels the request and
        frees its place. Raises DataError for a prompt that leaves no room, ArtifactError for an unknown adapter,
        LmrayError where the engine fails."""
        ...

    async def add_adapter(self, handle: str, folder: Path) -> None:
        """Loads a PEFT folder under `handle`. Raises ArtifactError for anything but a matching safetensors adapter,
        CapacityError beyond `max_adapters`."""
        ...

    async def remove_adapter(self, handle: str) -> None:
        """Refuses new requests for `handle` at once, and unloads it when its last request is done."""
        ...

    def stats(self) -> dict[str, Any]:
        """`waiting`, `running`, `adapters` (handles), `generated_tokens`, `failure` (None, or why the engine ended),
        `forward` (what runs the model, and why), and more that an engine has to tell; JSON types."""
        ...

    async def close(self) -> None:
        """Ends all requests and the engine's own threads."""
        ...


class EngineConfig(MemberConfig):
    """Base of `lmray/engines/*.py`."""

    max_batch_size: Annotated[int, Field(ge=1)] = 32
    """Sequences that are decoded side by side."""
    max_adapters: Annotated[int, Field(ge=0)] = 16
    max_length: Annotated[int, Field(ge=16)] = 2048
    """Longest sequence, prompt and answer together, in tokens."""
    needs_weights: ClassVar[bool] = True
    """Whether `start` takes a loaded model. Others run it elsewhere, from its folder (`model.name_or_path`), and are
    given one without weights."""
    chooses_weights: ClassVar[bool] = True
    """Whether it runs the model it is told to. Others ask a server that has one already."""

    decides_nothing: ClassVar[frozenset[str]] = frozenset({"max_batch_size", "max_adapters"})
    """Fields without a say in what is answered: how fast, where, and how long it may take."""

    @property
    def has_grammars(self) -> bool:
        """Whether it can hold answers to grammars at all; a tokenizer may be in the way."""
        return True

    @property
    def draft(self) -> str | None:
        """A second model that it runs, written like `model.source`; None: there is none."""
        return None

    def with_draft(self, folder: Path) -> EngineConfig:
        """The same with that model as a folder of this machine, as `check` and `start` want it."""
        return self

    def stamp(self) -> str:
        """Differs once what a running engine took from elsewhere than its fields is another."""
        return ""

    def check_spec(self, model: ModelSpec) -> None:
        """Raises ValueError for what a job wants of its model that this engine does not do."""
        for name in ("quantization", "rope_scaling"):
            if getattr(model, name) and not self.needs_weights:
                raise ValueError(
                    f"`model.{name}` is applied where the weights are, and engine `{self.name}` has none; "
                    "hint: set it up at the server, or take `engine: {name: native}`"
                )

    @abstractmethod
    def check(self, model: Any, adapters: Mapping[str, Path]) -> None:
        """Raises ConfigError for a model and ArtifactError for a PEFT folder that this engine cannot run. `model` needs
        no weights (device `meta`), so that a job can be checked before anything is loaded."""
        raise NotImplementedError

    @abstractmethod
    def start(self, model: Any, *, stop_token_ids: tuple[int, ...], threads: int, tokenizer: Any = None) -> Engine:
        """A running engine over a loaded `transformers` causal model, plain or with PEFT adapters attached, which it
        consumes: afterwards its weights may lie elsewhere, and nobody else can run it. `tokenizer` tells grammars what
        tokens say, and engines that are told text its tokens; without it answers are held to no grammar."""
        raise NotImplementedError


def check_length(model: Any, max_length: int) -> None:
    """Raises ConfigError where sequences of `max_length` tokens are more than `model` has positions for."""
    limit = num_positions(model.config)
    if limit is not None and limit < max_length:
        found = f"{max_length} tokens are more than {type(model).__name__} has positions for"
        raise ConfigError("engine.max_length", found, allowed=f"up to {limit}", hint=f"set it to {limit} or less")


def check_new(handle: str, taken: Collection[str], max_adapters: int) -> None:
    """Raises ArtifactError for a handle that is taken, CapacityError where there is no room for one more."""
    where = f"adapter `{handle}`"
    if handle in taken:
        raise ArtifactError(where, "is loaded already", hint="remove it first, or use another handle")
    if len(taken) >= max_adapters:
        found = f"{max_adapters} adapters are loaded already"
        raise CapacityError(where, found, hint="raise `engine.max_adapters`")


def check_loaded(handle: str, loaded: Collection[str]) -> None:
    """Raises ArtifactError for a handle of none that is `loaded`."""
    if handle not in loaded:
        allowed = ", ".join(sorted(loaded)) or "none is loaded"
        raise ArtifactError(f"adapter `{handle}`", "is not loaded", allowed=allowed, hint=did_you_mean(handle, loaded))


def check_request(
    request: Request, capabilities: Capabilities, adapters: Collection[str], *, running: Collection[str] = ()
) -> None:
    """Raises DataError or ArtifactError for a request that an engine cannot run. `running`: ids of those it runs."""
    where, num_tokens = f"request {request.id}", len(request.prompt_ids)
    if request.id in running:
        raise DataError(where, "is running already", hint="give every request its own id")
    if request.adapter is not None and request.adapter not in adapters:
        allowed = ", ".join(sorted(adapters)) or "only the base model"
        hint = did_you_mean(request.adapter, adapters)
        raise ArtifactError(where, f"unknown adapter `{request.adapter}`", allowed=allowed, hint=hint)
    if num_tokens == 0:
        raise DataError(where, "the prompt is empty")
    if num_tokens >= capabilities.max_length + (request.sampling.max_tokens == 0):
        allowed = f"up to {capabilities.max_length - 1}, so that an answer of one token fits"
        hint = "shorten the prompt, or raise `engine.max_length`"
        raise DataError(where, f"the prompt has {num_tokens} tokens", allowed=allowed, hint=hint)
    named = (*request.prompt_ids, *(token for token, _ in request.sampling.logit_bias))
    odd = next((token for token in named if not 0 <= token < capabilities.vocab_size), None)
    if odd is not None:
        raise DataError(where, f"token {odd} is none of the model's", allowed=f"0 to {capabilities.vocab_size - 1}")
    if request.sampling.grammar is not None and not capabilities.has_grammars:
        hint = "engine `native` does, with `lmray[guided]` where it runs and a model with a fast tokenizer"
        raise DataError(where, "this engine holds answers to no grammar", hint=hint)
