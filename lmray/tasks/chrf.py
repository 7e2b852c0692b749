"""chrF of translations, by the package sacrebleu: n-grams of characters, so that every script will do.

Popović 2015, chrF: character n-gram F-score for automatic MT evaluation; chrF++ with `word_order: 2` (Popović 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

from sacrebleu.metrics.chrf import CHRF

from lmray.data.base import Example
from lmray.tasks._sacrebleu import SacrebleuTask, fraction
from lmray.tasks.base import Scored


class Chrf(SacrebleuTask):
    """`eval.chrf`: corpus chrF over 100; of one example: the sentence's."""

    word_order: Literal[0, 1, 2] = 0
    """Longest n-grams of words that count beside those of characters. 0: chrF; 2: chrF++."""

    def corpus_metric(self) -> CHRF:
        return _metric(self.word_order)

    def score(self, example: Example, answer: str) -> dict[str, float]:
        return {"chrf": fraction(_metric(self.word_order).sentence_score(answer, [example.answer]).score)}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        return {"chrf": self.corpus_score(scored)}


@cache
def _metric(word_order: int) -> CHRF:
    return CHRF(word_order=word_order)
