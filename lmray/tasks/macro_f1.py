"""Classification with unequal classes: the mean over labels of each label's F1, as PubMedQA reports it.

Jin et al. 2019, arXiv:1909.06146, section 5. An answer without a label is a miss of the expected label and no hit of
another.
"""

from __future__ import annotations

from collections.abc import Sequence

from sklearn.metrics import f1_score

from lmray.data.base import Example
from lmray.tasks._labels import LabelTask
from lmray.tasks.base import Scored


class MacroF1(LabelTask):
    """`eval.macro_f1`, by scikit-learn over all examples; of one example: whether its label is right."""

    def score(self, example: Example, answer: str) -> dict[str, float]:
        return {"macro_f1": float(self.label_in(answer) == example.answer.strip())}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        expected = [one.expected.strip() for one in scored]
        named = [self.label_in(one.answer) for one in scored]
        labels = sorted({*expected, *(label for label in named if label is not None)})
        number = {label: index for index, label in enumerate(labels)}
        value = f1_score(
            [number[label] for label in expected],
            [number.get(label, -1) if label is not None else -1 for label in named],
            labels=range(len(labels)),
            average="macro",
            zero_division=0,  # type: ignore[arg-type]
        )
        return {"macro_f1": float(value)}
