"""BLEU of translations, by the package sacrebleu.

Papineni et al. 2002, BLEU: a Method for Automatic Evaluation of Machine Translation; Post 2018, arXiv:1804.08771.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

from sacrebleu.metrics.bleu import BLEU

from lmray.data.base import Example
from lmray.tasks._sacrebleu import SacrebleuTask, fraction
from lmray.tasks.base import Scored


class Bleu(SacrebleuTask):
    """`eval.bleu`: corpus BLEU over 100; of one example: the sentence's, with the n-grams it is long enough for."""

    tokenize: Literal["13a", "intl", "char", "none"] = "13a"
    """sacrebleu's tokenizer. `13a`: the usual one; `intl`: also splits at punctuation of other scripts; `char`: every
    character, for Japanese, Chinese and Thai; `none`: at spaces only."""
    lowercase: bool = False
    """Compare without case."""

    def corpus_metric(self) -> BLEU:
        return _metric(self.tokenize, self.lowercase, sentence=False)

    def score(self, example: Example, answer: str) -> dict[str, float]:
        found = _metric(self.tokenize, self.lowercase, sentence=True).sentence_score(answer, [example.answer])
        return {"bleu": fraction(found.score)}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        return {"bleu": self.corpus_score(scored)}


@cache
def _metric(tokenize: str, lowercase: bool, *, sentence: bool) -> BLEU:
    return BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=sentence, force=True)
