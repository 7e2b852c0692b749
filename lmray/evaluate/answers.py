"""Asking a model for answers to held-out examples, and scoring them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmray.data.base import Example
from lmray.data.tokenise import prompt_ids
from lmray.engines.native import generate
from lmray.job import EvaluateArgs
from lmray.models.load import stop_token_ids
from lmray.models.precision import computing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """What was asked, expected and said, with its scores: one line of `answers-LABEL.jsonl`."""

    prompt: str
    expected: str
    answer: str
    scores: dict[str, float] = field(default_factory=dict)


def sample_evenly(examples: Sequence[Example], count: int | None) -> list[Example]:
    """At most `count` of `examples`, spread evenly over them."""
    if count is None or count >= len(examples):
        return list(examples)
    return [examples[index * len(examples) // count] for index in range(count)]


def answer_examples(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    args: EvaluateArgs,
    *,
    adapter: str | None,
    shots: Sequence[Example] = (),
    threads: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Greedy answers of `model` to `examples`, scored by every task of `args` that generates. `shots` are solved
    examples put before each question; `adapter` is the attached adapter's handle, None the base model."""
    shown = [message for shot in shots for message in shot.messages]
    prompts = [prompt_ids(tokenizer, [*shown, *example.prompt]) for example in examples]
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
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in generated]
    tasks = [task for task in args.tasks if task.generates]
    return [
        Answer(
            example.prompt[-1]["content"],
            example.answer,
            text,
            {name: value for task in tasks for name, value in task.score(example, text).items()},
        )
        for example, text in zip(examples, texts, strict=True)
    ]


def mean_scores(answers: Sequence[Answer], prefix: str) -> dict[str, float]:
    """`{prefix.NAME: mean}` over `answers`."""
    names = {name for answer in answers for name in answer.scores}
    scores: dict[str, Any] = {
        f"{prefix}.{name}": sum(answer.scores.get(name, 0.0) for answer in answers) / len(answers)
        for name in sorted(names)
    }
    return scores
