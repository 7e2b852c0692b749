"""Classification: answers that name the expected label, before any other."""

from __future__ import annotations

from lmray.data.base import Example
from lmray.tasks._labels import LabelTask


class Accuracy(LabelTask):
    """`eval.accuracy`: share of answers in which the first label is the expected one."""

    def score(self, example: Example, answer: str) -> dict[str, float]:
        return {"accuracy": float(self.label_in(answer) == example.answer.strip())}
