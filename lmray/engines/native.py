"""The embedded engine: continuous batching over any `transformers` causal model, rows of one batch on mixed adapters.

One worker thread owns the model and does the steps; requests reach it through an inbox, tokens come back through the
caller's event loop. No kernels of its own: keys and values of a row live in a slot of one preallocated block, and mixed
adapters go through PEFT's per-row adapter names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from lmray.engines._adapter_folder import read_adapter_folder
from lmray.engines._stepper import Stepper, check_model
from lmray.engines._worker import NativeEngine
from lmray.engines.base import EngineConfig, Request, Sampling, check_request
from lmray.errors import LmrayError


class Native(EngineConfig):
    """Runs the model in this process."""

    max_prefill_tokens: Annotated[int, Field(ge=1)] = 512
    """Prompt tokens read between two decoding steps; at least one prompt is. Lower: running answers pause less."""

    def make_stepper(self, model: Any, *, stop_token_ids: tuple[int, ...], tokenizer: Any = None) -> Stepper:
        """The engine's synchronous core. Raises ConfigError for a model it cannot run."""
        return Stepper(
            model,
            stop_token_ids=stop_token_ids,
            max_batch_size=self.max_batch_size,
            max_adapters=self.max_adapters,
            max_length=self.max_length,
            max_prefill_tokens=self.max_prefill_tokens,
            tokenizer=tokenizer,
        )

    def check(self, model: Any, adapters: Mapping[str, Path]) -> None:
        check_model(model, self.max_length)
        for folder in adapters.values():
            read_adapter_folder(folder, model)

    def start(
        self, model: Any, *, stop_token_ids: tuple[int, ...], threads: int, tokenizer: Any = None
    ) -> NativeEngine:
        stepper = self.make_stepper(model, stop_token_ids=stop_token_ids, tokenizer=tokenizer)
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
        while stepper.slots.busy:
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
