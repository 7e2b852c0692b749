"""A task scores what a model does with held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from lmray.config import MemberConfig
from lmray.data.base import Example

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scored:
    """One example with what a task made of it; what `Task.aggregate` is given."""

    expected: str
    answer: str
    scores: dict[str, float]
    statistics: tuple[float, ...] = ()
    """What a corpus metric adds up over examples."""


class Task(MemberConfig):
    """Base of `lmray/tasks/*.py`. A task asks for one thing of a model (`needs`), scores each example, and makes
    metrics of the scores."""

    needs: ClassVar[Literal["answers", "choices", "loss", "model"]] = "loss"
    """`answers`: generated text, for `score`. `choices`: the log-likelihood of each of an example's choices, for
    `score_choices`. `loss`: the held-out loss alone. `model`: the model itself, for `run`; no data of the job."""

    def check(self) -> None:
        """Raises ConfigError or DataError where what it needs besides the job's data (a package, benchmarks) is not
        there."""

    def for_examples(self, examples: Sequence[Example]) -> Self:
        """This task with what it takes from the data (labels) filled in. Raises DataError where the data does not have
        it."""
        return self

    def score(self, example: Example, answer: str) -> dict[str, float]:
        """Scores of one generated answer by name, each 0 to 1."""
        raise NotImplementedError(f"{self.name} scores no generated answers")

    def statistics(self, example: Example, answer: str) -> tuple[float, ...]:
        """What `aggregate` adds up, where that is more than the scores."""
        return ()

    def choices(self, example: Example) -> tuple[str, ...]:
        """What the model is to choose from. Raises DataError where the example has no choices."""
        raise NotImplementedError(f"{self.name} has no choices")

    def score_choices(self, example: Example, log_likelihoods: Sequence[float]) -> dict[str, float]:
        """Scores of one example by name, each 0 to 1. `log_likelihoods`: of each of its choices given the prompt, in
        nats."""
        raise NotImplementedError(f"{self.name} has no choices")

    def run(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> dict[str, float]:
        """Metrics of a loaded model by name, which become `eval.NAME`; `NAME_stderr` is the standard error of NAME."""
        raise NotImplementedError(f"{self.name} runs nothing of its own")

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Metrics of at least one example by name, which become `eval.NAME`. Here the mean of each score, one that an
        example has not counted as 0."""
        names = {name for one in scored for name in one.scores}
        return {name: sum(one.scores.get(name, 0.0) for one in scored) / len(scored) for name in sorted(names)}
