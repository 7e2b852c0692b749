"""Scores of a whole corpus, by the package sacrebleu, from what each sentence adds to them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from sacrebleu.metrics.base import Metric

from lmray.data.base import Example
from lmray.tasks.base import Scored, Task


class SacrebleuTask(Task):
    """Base of tasks that sacrebleu scores: `score` is the sentence's own, `aggregate` the corpus's."""

    needs = "answers"

    @abstractmethod
    def corpus_metric(self) -> Metric:
        """What scores the corpus."""
        raise NotImplementedError

    def statistics(self, example: Example, answer: str) -> tuple[float, ...]:
        # What every metric of sacrebleu implements, and its own bootstrap starts from: a thousand resamples need the
        # texts' n-grams once only.
        (found,) = self.corpus_metric()._extract_corpus_statistics([answer], [[example.answer]])
        return tuple(found)

    def corpus_score(self, scored: Sequence[Scored]) -> float:
        """sacrebleu's score, 0 to 1."""
        added = [sum(column) for column in zip(*(one.statistics for one in scored), strict=True)]
        return fraction(self.corpus_metric()._compute_score_from_stats(added).score)


def fraction(percent: float) -> float:
    """sacrebleu's score over 100; rounding does not bring it above 1."""
    return min(percent / 100, 1.0)
