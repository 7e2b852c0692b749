"""Multiple choice without generating: the choice that the model finds likeliest after the prompt.

Brown et al. 2020, arXiv:2005.14165, section 2.4; the two scores are those of Gao et al., lm-evaluation-harness (`acc`,
`acc_norm`). Differs from the harness in: the prompt is the model's own chat template, and the length that normalises is
counted in bytes of UTF-8, so that it means the same in every script.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

from lmray.data.base import Example
from lmray.errors import DataError
from lmray.tasks.base import Task


class MultipleChoice(Task):
    """`eval.multiple_choice`: by log-likelihood; `eval.multiple_choice_norm`: by log-likelihood per byte."""

    column: str = "choices"
    """Column with the choices: a list of texts, or `{text: [...], label: [...]}` as in ARC. The expected answer is one
    of the texts or one of the labels."""

    needs = "choices"

    def choices(self, example: Example) -> tuple[str, ...]:
        return self._texts_and_labels(example)[0]

    def score_choices(self, example: Example, log_likelihoods: Sequence[float]) -> dict[str, float]:
        texts, labels = self._texts_and_labels(example)
        right = (texts if example.answer in texts else labels).index(example.answer)
        per_byte = [value / len(text.encode()) for value, text in zip(log_likelihoods, texts, strict=True)]
        return {
            "multiple_choice": float(likeliest(log_likelihoods) == right),
            "multiple_choice_norm": float(likeliest(per_byte) == right),
        }

    def _texts_and_labels(self, example: Example) -> tuple[tuple[str, ...], tuple[str, ...]]:
        where = f"{example.where}: column `{self.column}`"
        if self.column not in example.columns:
            raise DataError(where, "is missing", allowed=", ".join(example.columns) or "no columns here")
        value = example.columns[self.column]
        texts, labels = (value.get("text"), value.get("label", [])) if isinstance(value, dict) else (value, [])
        if not _are_texts(texts) or len(texts) < 2 or len(set(texts)) < len(texts):
            raise DataError(where, f"holds {str(value)[:60]}", allowed="a list of two or more different texts")
        if labels and not (_are_texts(labels) and len(labels) == len(texts)):
            raise DataError(where, f"{len(texts)} texts with labels {str(labels)[:60]}", allowed="a label a text")
        if example.answer not in texts and example.answer not in labels:
            allowed = ", ".join([*texts, *labels])
            raise DataError(where, f"the expected answer `{example.answer}` is no choice", allowed=allowed)
        return tuple(texts), tuple(labels)


def likeliest(values: Sequence[float]) -> int:
    """Place of the largest, the first of equals."""
    return max(range(len(values)), key=lambda index: values[index])


def _are_texts(value: Any) -> TypeGuard[Sequence[str]]:
    return isinstance(value, list | tuple) and all(isinstance(one, str) and one for one in value)
