"""Asking a model for answers to held-out examples, and the files that answers are kept in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lmray.artifacts.files import write_atomic
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


def answers_path(folder: Path, label: str) -> Path:
    """Where the answers of target `label` are in a run's folder."""
    return folder / f"answers-{label}.jsonl"


def save_answers(answers: Sequence[Answer], path: Path) -> None:
    """One JSON line an answer."""
    lines = (asdict(answer) for answer in answers)
    kept = ({key: value for key, value in line.items() if key != "log_likelihoods" or value} for line in lines)
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def read_answers(folder: Path) -> dict[str, list[Answer]]:
    """Every target's answers in a run's folder, by label."""
    return {
        path.stem.removeprefix("answers-"): [Answer(**json.loads(line)) for line in _lines(path)]
        for path in sorted(folder.glob("answers-*.jsonl"))
    }


def _lines(path: Path) -> list[str]:
    """Cut at line feeds only: `splitlines` also cuts at U+2028 and others, which stand in texts and in JSON as they
    are."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line]


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
