"""Asking a model for answers to held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from lmray.data.base import Example
from lmray.data.tokenise import prompt_ids
from lmray.engines.native import generate
from lmray.job import EvaluateArgs
from lmray.models.load import stop_token_ids
from lmray.models.precision import computing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Anything = TypeVar("Anything")


@dataclass(frozen=True)
class Answer:
    """What was asked, expected and said, with its scores: one line of `answers-LABEL.jsonl`."""

    prompt: str
    expected: str
    answer: str
    """The generated text; where only choices were compared, the likeliest of them."""
    scores: dict[str, float] = field(default_factory=dict)
    log_likelihoods: dict[str, float] = field(default_factory=dict)
    """Of each choice, in nats."""


def sample_evenly(examples: Sequence[Anything], count: int | None) -> list[Anything]:
    """At most `count` of `examples`, spread evenly over them."""
    if count is None or count >= len(examples):
        return list(examples)
    return [examples[index * len(examples) // count] for index in range(count)]


def generate_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    args: EvaluateArgs,
    *,
    adapter: str | None,
    shots: Sequence[Example] = (),
    threads: int = 1,
    progress: Callable[[int], None] = lambda num_done: None,
) -> list[str]:
    """Greedy answers of `model` to `examples`. `shots` are solved examples put before each question; `adapter` is the
    attached adapter's handle, None the base model; `progress` is told how many answers are done."""
    shown = [message for shot in shots for message in shot.messages]
    prompts = [prompt_ids(tokenizer, [*shown, *example.prompt], example.tools) for example in examples]
    with computing(model):
        generated = generate(
            model,
            prompts,
            stop_token_ids=stop_token_ids(model, tokenizer),  # type: ignore[arg-type]
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            threads=threads,
            adapter=adapter,
            progress=progress,
        )
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in generated]
