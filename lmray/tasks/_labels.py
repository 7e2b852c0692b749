"""Classification by generated text: which of the labels an answer names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field

from lmray.data.base import Example
from lmray.errors import DataError
from lmray.tasks._words import words
from lmray.tasks.base import Task

MAX_LABELS = 100
"""More different answers than this are no labels."""


class LabelTask(Task):
    """Base of tasks whose expected answers are labels."""

    labels: Annotated[tuple[str, ...], Field(max_length=MAX_LABELS)] = ()
    """All labels. Empty: the different expected answers of the held-out data."""

    needs = "answers"

    def for_examples(self, examples: Sequence[Example]) -> Self:
        found = {example.answer.strip(): example.where for example in reversed(examples)}
        if not self.labels:
            if len(found) > MAX_LABELS:
                allowed, hint = f"at most {MAX_LABELS} labels", "`exact_match` and `f1` score free text"
                where = f"task `{self.name}`"
                raise DataError(where, f"{len(found)} different answers expected", allowed=allowed, hint=hint)
            return self.model_copy(update={"labels": tuple(sorted(found))})
        for label, where in found.items():
            if label not in self.labels:
                raise DataError(where, f"answer `{label}` is no label", allowed=", ".join(self.labels))
        return self

    def label_in(self, answer: str) -> str | None:
        """The label that is the answer, or else stands first in it as whole words, the longest of those that start
        there; None where the answer has none."""
        if answer.strip() in self.labels:
            return answer.strip()
        found = words(answer)
        spelt = {label: words(label) for label in self.labels}
        for place in range(len(found)):
            there = [label for label, word in spelt.items() if word and found[place : place + len(word)] == word]
            if there:
                return max(there, key=lambda label: len(spelt[label]))
        return None
