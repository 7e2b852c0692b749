"""All of a job's tasks on one loaded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmray.artifacts.files import sha256_json
from lmray.data.base import Example
from lmray.data.batch import Packed
from lmray.errors import DataError
from lmray.evaluate.answers import Answer, generate_answers, sample_evenly
from lmray.evaluate.choices import choice_log_likelihoods
from lmray.evaluate.kept import Kept
from lmray.evaluate.loss import example_losses
from lmray.job import EvaluateArgs
from lmray.models.load import pad_token_id
from lmray.tasks.base import Scored, Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
"""Told what is being done (`loss`, `answers`, `choices`, `benchmarks`), how many of them are done, and of how many."""


@dataclass(frozen=True)
class HeldOut:
    """What to measure on."""

    examples: Sequence[Example]
    rows: Sequence[Packed]
    """The same examples, tokenised, for the loss."""


@dataclass(frozen=True)
class Measured:
    """One target's metrics (`eval.*`, or `base.*`) and its answers."""

    metrics: dict[str, float]
    answers: tuple[Answer, ...]
    evidence: tuple[tuple[Task, tuple[Scored, ...]], ...] = ()
    """Each task with what it made of each example: what the metrics were made of, in one order for all targets."""


@dataclass(frozen=True)
class Asked:
    """A loaded model and how to ask it."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    adapter: str | None
    """Handle of the attached adapter; None the base model."""
    shots: Sequence[Example]
    """Solved examples put before each question."""
    device: str
    threads: int
    progress: Progress
    kept: Kept

    def losses(self, rows: Sequence[Packed]) -> list[tuple[float, int]]:
        """`example_losses` of `rows`."""
        with _with_adapter(self.model, self.adapter):
            found = self.kept.once(
                "losses",
                lambda: example_losses(
                    self.model,
                    rows,
                    batch_size=8,
                    pad_token_id=pad_token_id(self.tokenizer),
                    device=self.device,
                    progress=lambda done: self.progress("loss", done, len(rows)),
                ),
            )
        return [(loss, count) for loss, count in found]

    def answers(self, examples: Sequence[Example], args: EvaluateArgs) -> list[str]:
        """Greedy answers to `examples`."""
        return self.kept.once(
            "answers",
            lambda: generate_answers(
                self.model,
                self.tokenizer,
                examples,
                args,
                adapter=self.adapter,
                shots=self.shots,
                threads=self.threads,
                progress=lambda done: self.progress("answers", done, len(examples)),
            ),
        )

    def log_likelihoods(self, task: Task, examples: Sequence[Example], *, batch_size: int) -> list[dict[str, float]]:
        """Of each example's choices."""
        asked = [(example, task.choices(example)) for example in examples]
        total, choices_digest = sum(len(choices) for _, choices in asked), sha256_json([one for _, one in asked])[:16]
        with _with_adapter(self.model, self.adapter):
            found = self.kept.once(
                f"choices {task.name} {choices_digest}",
                lambda: choice_log_likelihoods(
                    self.model,
                    self.tokenizer,
                    asked,
                    shots=self.shots,
                    batch_size=batch_size,
                    device=self.device,
                    progress=lambda done: self.progress("choices", done, total),
                ),
            )
        return [dict(zip(choices, values, strict=True)) for (_, choices), values in zip(asked, found, strict=True)]

    def benchmarks(self, task: Task, *, batch_size: int) -> dict[str, float]:
        """What `task` makes of the model itself."""
        self.progress("benchmarks", 0, 1)
        with _with_adapter(self.model, self.adapter):
            found = task.run(self.model, self.tokenizer, batch_size=batch_size)
        self.progress("benchmarks", 1, 1)
        return found


def check_tasks(tasks: Sequence[Task], examples: Sequence[Example]) -> None:
    """Raises DataError where held-out `examples` lack what a task scores by, or what `Task.check` raises, before a
    model is loaded."""
    text = next((example.where for example in examples if example.text is not None), None)
    for task in tasks:
        task.check()
        if task.needs in ("answers", "choices") and text is not None:
            hint = "plain text has a loss and a perplexity: `tasks: [loss]`"
            raise DataError(text, f"holds no answer for the task `{task.name}`", hint=hint)
        task.for_examples(examples)
        for example in examples if task.needs == "choices" else ():
            task.choices(example)


def measure(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    args: EvaluateArgs,
    *,
    adapter: str | None,
    prefix: str = "eval",
    loss: float | None = None,
    shots: Sequence[Example] = (),
    device: str = "cpu",
    threads: int = 1,
    progress: Progress = lambda doing, done, total: None,
    kept: Kept | None = None,
) -> Measured:
    """Runs every task of `args`. `adapter` None measures the base model even where an adapter is attached.

    `loss` is the held-out loss where it is known already. It is taken without shots: it asks how likely the right
    answers are, not what is copied from solved examples. What is in `kept` is not asked again.
    """
    asked = Asked(model, tokenizer, adapter, shots, device, threads, progress, kept or Kept())
    tasks = [task.for_examples(held_out.examples) for task in args.tasks]
    evidence: list[tuple[Task, tuple[Scored, ...]]] = []
    for task in tasks:
        if task.needs == "loss" and held_out.rows:
            sums = asked.losses(held_out.rows) if loss is None else [(loss, 1)]
            evidence.append((task, tuple(Scored("", "", {}, statistics=one) for one in sums)))
    answers, scored = _answered(asked, tasks, sample_evenly(held_out.examples, args.max_examples), args)
    metrics = {
        f"{prefix}.{name}": value for task, found in evidence + scored for name, value in task.aggregate(found).items()
    }
    for task in tasks:
        if task.needs == "model":
            found = asked.benchmarks(task, batch_size=args.batch_size)
            metrics |= {f"{prefix}.{name}": value for name, value in found.items()}
    return Measured(metrics, answers, tuple(evidence + scored))


def _answered(
    asked: Asked, tasks: Sequence[Task], examples: Sequence[Example], args: EvaluateArgs
) -> tuple[tuple[Answer, ...], list[tuple[Task, tuple[Scored, ...]]]]:
    """What the model answers and chooses, and what each task makes of it."""
    tasks = [task for task in tasks if task.needs in ("answers", "choices")]
    if not tasks or not examples:
        return (), []
    texts: list[str] = []
    if any(task.needs == "answers" for task in tasks):
        texts = asked.answers(examples, args)
    evidence: list[tuple[Task, tuple[Scored, ...]]] = []
    likelihoods: list[dict[str, float]] = [{} for _ in examples]
    for task in tasks:
        if task.needs == "choices":
            likelihoods = asked.log_likelihoods(task, examples, batch_size=args.batch_size)
            evidence.append((task, tuple(map(_chosen(task), examples, likelihoods))))
        else:
            evidence.append((task, tuple(map(_said(task), examples, texts))))
    texts = texts or [max(one, key=lambda choice: one[choice]) for one in likelihoods]
    per_example = zip(examples, texts, likelihoods, *(found for _, found in evidence), strict=True)
    answers = tuple(
        Answer(
            example.prompt[-1]["content"] if example.prompt else "",
            example.answer,
            text,
            {name: value for one in scored for name, value in one.scores.items()},
            values,
        )
        for example, text, values, *scored in per_example
    )
    return answers, evidence


def _said(task: Task) -> Callable[[Example, str], Scored]:
    return lambda example, text: Scored(example.answer, text, task.score(example, text), task.statistics(example, text))


def _chosen(task: Task) -> Callable[[Example, dict[str, float]], Scored]:
    return lambda example, values: Scored(
        example.answer, max(values, key=lambda choice: values[choice]), task.score_choices(example, [*values.values()])
    )


def _with_adapter(model: torch.nn.Module, adapter: str | None) -> AbstractContextManager[object]:
    """Inside, an attached adapter is off where `adapter` is None."""
    if adapter is None and hasattr(model, "disable_adapter"):
        return model.disable_adapter()  # type: ignore[operator]
    return nullcontext()
