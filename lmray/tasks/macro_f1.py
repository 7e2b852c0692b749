"""Classification with unequal classes: the mean over labels of each label's F1, as PubMedQA reports it.

Jin et al. 2019, arXiv:1909.06146, section 5. An answer without a label is a miss of the expected label and no hit of
another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lmray.data.base import Example
from lmray.tasks._labels import LabelTask
from lmray.tasks.base import Scored


class MacroF1(LabelTask):
    """`eval.macro_f1`, over the labels that are expected or named; of one example: whether its label is right."""

    def score(self, example: Example, answer: str) -> dict[str, float]:
        return {"macro_f1": float(self.label_in(answer) == example.answer.strip())}

    def statistics(self, example: Example, answer: str) -> tuple[float, ...]:
        """Places in `labels` of the expected label and of the answer's, -1 where it has none."""
        named = self.label_in(answer)
        return self.labels.index(example.answer.strip()), -1 if named is None else self.labels.index(named)

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        # Not scikit-learn's f1_score, which this equals (see its test): a thousand resamples would wait for its checks.
        expected = Counter(one.statistics[0] for one in scored)
        named = Counter(one.statistics[1] for one in scored)
        hits = Counter(one.statistics[0] for one in scored if one.statistics[0] == one.statistics[1])
        seen = (expected.keys() | named.keys()) - {-1}
        return {"macro_f1": sum(2 * hits[label] / (expected[label] + named[label]) for label in seen) / len(seen)}
