"""Overlap of the answer's and the expected answer's tokens, as SQuAD scores it.

Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1. Differs from the paper in: scripts written without spaces count
letters, see `lmray.tasks._words`.
"""

from __future__ import annotations

from collections import Counter

from lmray.data.base import Example
from lmray.tasks._words import squad_words
from lmray.tasks.base import Task


class F1(Task):
    """`eval.f1`: harmonic mean of precision and recall over tokens, averaged over the examples."""

    needs = "answers"

    def score(self, example: Example, answer: str) -> dict[str, float]:
        found, expected = squad_words(answer), squad_words(example.answer)
        if not found or not expected:
            return {"f1": float(answer.strip() == example.answer.strip())}
        common = (Counter(found) & Counter(expected)).total()
        return {"f1": 2 * common / (len(found) + len(expected))}
