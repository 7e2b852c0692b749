"""ROUGE of summaries, by the package rouge-score.

Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries. Differs from the package's own words in: scripts
written without spaces count letters, other scripts than Latin count at all; no stemming. English scores are the same.
"""

from __future__ import annotations

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from lmray.data.base import Example
from lmray.tasks._words import words
from lmray.tasks.base import Task


class _Words(Tokenizer):
    def tokenize(self, text: str) -> list[str]:
        return words(text)


_SCORER = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())


class Rouge(Task):
    """`eval.rouge1`, `eval.rouge2`, `eval.rougeL`: F-measures, averaged over the examples."""

    needs = "answers"

    def score(self, example: Example, answer: str) -> dict[str, float]:
        found = _SCORER.score(example.answer, answer)
        return {
            "rouge1": found["rouge1"].fmeasure,
            "rouge2": found["rouge2"].fmeasure,
            "rougeL": found["rougeL"].fmeasure,
        }
