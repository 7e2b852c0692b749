from __future__ import annotations

import pytest

from lmray.data.base import Example
from lmray.tasks.base import Scored


@pytest.fixture
def example():
    """An example with the expected answer and columns given."""

    def make(answer: str, row: int = 1, **columns) -> Example:
        messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": answer})
        return Example(messages, f"f.jsonl:{row}", columns)

    return make


@pytest.fixture
def metrics(example):
    """The metrics of `(expected, answer)` pairs by a task."""

    def of(task, *pairs: tuple[str, str]) -> dict[str, float]:
        examples = [example(expected, row) for row, (expected, _) in enumerate(pairs, start=1)]
        fitted = task.for_examples(examples)
        scored = [
            Scored(expected, answer, fitted.score(one, answer), fitted.statistics(one, answer))
            for one, (expected, answer) in zip(examples, pairs, strict=True)
        ]
        return fitted.aggregate(scored)

    return of
