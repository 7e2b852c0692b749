"""The embedded engine: continuous batching over any `transformers` causal model, rows of one batch on mixed adapters.

One worker thread owns the model and does the steps; requests reach it through an inbox, tokens come back through the
caller's event loop. Models built like Llama run through a forward of their own: keys and values in blocks that are
shared between requests with a common beginning, prompts read in chunks, all adapters in one pass. Any other model runs
through its own forward: a row of one preallocated block for each request, mixed adapters by PEFT's per-row names. Which
of the two, and why, is `forward` in the engine's stats.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from peft import PeftModel
from pydantic import Field, model_validator

from lmray.config import Member
from lmray.engines._adapter_folder import read_adapter_folder
from lmray.engines._core import Core, Sampler
from lmray.engines._decoder import unfit
from lmray.engines._grammar import Grammars
from lmray.engines._paged import BLOCK_SIZE, PagedStepper
from lmray.engines._schedule import Limits
from lmray.engines._speculation.base import Speculation
from lmray.engines._stepper import Stepper, check_model
from lmray.engines._worker import NativeEngine
from lmray.engines.base import Capabilities, EngineConfig, Request, Sampling, check_request
from lmray.errors import ConfigError, LmrayError
from lmray.models.spec import ModelSpec
from lmray.registry import SPECULATIONS


class Native(EngineConfig):
    """Runs the model in this process."""

    decides_nothing: ClassVar[frozenset[str]] = EngineConfig.decides_nothing | {
        "max_prefill_tokens",
        "cache_tokens",
        "speculation",
        "torch_compile",
    }
    max_prefill_tokens: Annotated[int, Field(ge=1)] = 512
    """Prompt tokens read in a step, beside one token for each request that generates. Lower: running answers pause
    less."""
    cache_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens whose keys and values are kept, also of requests that ended; at least `max_length`. Empty: `max_length`
    for each of `max_batch_size` requests. Where they run out, requests wait, or are read again later. Models that run
    through their own forward always keep that many."""
    speculation: Annotated[Speculation, Member(SPECULATIONS)] | None = None
    """Who proposes tokens ahead of the model. Empty: nobody."""
    torch_compile: bool = False
    """Compiles what stands between the matrix products, at the first requests, with the C++ compiler that `CXX` names,
    else g++, on a GPU with Triton."""

    @model_validator(mode="after")
    def _holds_one_request(self):
        if self.cache_tokens is not None and self.cache_tokens < self.max_length:
            found = f"`cache_tokens` {self.cache_tokens} is below `max_length` {self.max_length}"
            raise ValueError(f"{found}: no request of that length could ever run")
        return self

    @property
    def draft(self) -> str | None:
        return None if self.speculation is None else self.speculation.source

    def with_draft(self, folder: Path) -> Native:
        assert self.speculation is not None
        return self.model_copy(update={"speculation": self.speculation.with_source(folder)})

    def make_stepper(self, model: Any, *, stop_token_ids: tuple[int, ...], tokenizer: Any = None) -> Core:
        """The engine's synchronous core. Raises ConfigError for a model it cannot run."""
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        check_model(base, self.max_length)
        vocab_size = int(base.get_input_embeddings().weight.shape[0])
        grammars = Grammars.of(tokenizer, vocab_size, stop_token_ids)
        sizes = self.max_batch_size, self.max_adapters, self.max_length, vocab_size
        capabilities = Capabilities(*sizes, has_grammars=grammars is not None)
        sampler = Sampler(frozenset(stop_token_ids), grammars)
        reason = unfit(model)
        if reason is not None:
            self._check_forward(reason)
            budget = self.max_prefill_tokens
            return Stepper(model, sampler=sampler, capabilities=capabilities, max_prefill_tokens=budget, reason=reason)
        self._check_compiler(base.device.type)
        told: dict[str, Any] = {"limits": self._limits(), "compiled": self.torch_compile}
        stepper = PagedStepper(model, sampler=sampler, capabilities=capabilities, **told)
        if self.speculation is not None:
            stepper.speculate(self.speculation.start(base, self._limits()), self.speculation.num_tokens)
        return stepper

    def _limits(self) -> Limits:
        per_request = -(-self.max_length // BLOCK_SIZE)
        num_blocks = self.max_batch_size * per_request
        if self.cache_tokens is not None:
            num_blocks = max(self.cache_tokens // BLOCK_SIZE, per_request)
        return Limits(self.max_batch_size, self.max_length, num_blocks, BLOCK_SIZE, self.max_prefill_tokens)

    def check_spec(self, model: ModelSpec) -> None:
        super().check_spec(model)
        if model.quantization and self.speculation is not None:
            raise ValueError("cannot speculate with quantised weights; hint: leave `engine.speculation` out")

    def check(self, model: Any, adapters: Mapping[str, Path]) -> None:
        check_model(model, self.max_length)
        self._check_forward(unfit(model))
        self._check_compiler(model.device.type)
        if self.speculation is not None:
            self.speculation.check(model)
        for folder in adapters.values():
            read_adapter_folder(folder, model)

    def _check_forward(self, reason: str | None) -> None:
        """`reason`: why the model does not run through blocks, where alone several tokens of a row can be read, and
        the forward is ours to compile."""
        asked = {"speculation": self.speculation is not None, "torch_compile": self.torch_compile}
        for name, does in {"speculation": "speculate with", "torch_compile": "compile"}.items():
            if reason is not None and asked[name]:
                found = f"`native` cannot {does} this model: {reason}"
                raise ConfigError(f"engine.{name}", found, hint="leave it out")

    def _check_compiler(self, device_type: str) -> None:
        if not self.torch_compile:
            return
        compiler = os.environ.get("CXX", "g++")
        if not (shutil.which(compiler) if device_type == "cpu" else find_spec("triton")):
            found = f"there is no `{compiler if device_type == 'cpu' else 'triton'}` to compile with"
            raise ConfigError("engine.torch_compile", found, hint="install it, or leave the field out")

    def start(
        self, model: Any, *, stop_token_ids: tuple[int, ...], threads: int, tokenizer: Any = None
    ) -> NativeEngine:
        model.requires_grad_(False)  # frozen weights of layers that share an input are multiplied as one
        stepper = self.make_stepper(model, stop_token_ids=stop_token_ids, tokenizer=tokenizer)
        if isinstance(stepper, PagedStepper):
            stepper.pack()  # the engine is all that runs the model from now on
        return NativeEngine(stepper, threads=threads)


def generate(
    model: Any,
    prompts: list[tuple[int, ...]],
    *,
    stop_token_ids: tuple[int, ...],
    max_new_tokens: int,
    batch_size: int,
    threads: int,
    adapter: str | None = None,
    progress: Callable[[int], None] = lambda num_done: None,
) -> list[list[int]]:
    """Greedy answers to `prompts`, in their order, without the stop token; on the calling thread.

    `adapter` is one that came attached to `model` (`default`), None the base model. `progress` is told how many answers
    are done. `model` is given back as it came. Raises DataError for an empty prompt.
    """
    if not prompts:
        return []
    longest = max(len(prompt) for prompt in prompts)
    config = Native.model_construct(
        max_batch_size=min(batch_size, len(prompts)),
        max_adapters=0,
        max_length=longest + max_new_tokens,
        max_prefill_tokens=max(longest, 1) * batch_size,
    )
    stepper = config.make_stepper(model, stop_token_ids=stop_token_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):  # like lengths share batches
            request = Request(str(index), prompts[index], Sampling(max_tokens=max_new_tokens), adapter)
            check_request(request, stepper.capabilities, stepper.adapters.handles)
            stepper.add(request)
        num_done = 0
        while stepper.busy:
            for request_id, outcome in stepper.step():
                if isinstance(outcome, LmrayError):
                    raise outcome
                if outcome.token_id is not None:
                    answers[int(request_id)].append(outcome.token_id)
                num_done += outcome.finish_reason is not None
            progress(num_done)
    finally:
        torch.set_num_threads(num_threads)
        stepper.adapters.restore()
    return answers
