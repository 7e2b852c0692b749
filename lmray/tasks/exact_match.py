"""Answers that equal the expected one, as they stand and as SQuAD compares them.

Rajpurkar et al. 2016, arXiv:1606.05250. Differs from the paper in: see `lmray.tasks._words.squad_normalised`.
"""

from __future__ import annotations

from lmray.data.base import Example
from lmray.tasks._words import squad_normalised
from lmray.tasks.base import Task


class ExactMatch(Task):
    """`eval.exact_match`: without case, punctuation, articles and extra spaces; `eval.exact_match_strict`: with
    them, but for spaces around."""

    needs = "answers"

    def score(self, example: Example, answer: str) -> dict[str, float]:
        strict = answer.strip() == example.answer.strip()
        alike = strict or (
            squad_normalised(answer) == squad_normalised(example.answer) != ""  # "?!" is not "..."
        )
        return {"exact_match": float(alike), "exact_match_strict": float(strict)}
