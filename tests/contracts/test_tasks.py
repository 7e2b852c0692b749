"""What every task keeps to."""

from __future__ import annotations

import pytest

from lmray.data.base import Example
from lmray.metrics.names import METRICS
from lmray.registry import TASKS

EXAMPLE = Example(({"role": "user", "content": "q"}, {"role": "assistant", "content": '{"a": 1}'}), "file:1")


@pytest.fixture(params=[name for name in TASKS.names() if TASKS.load(name).generates])
def task(request):
    return TASKS.load(request.param)()


def test_the_expected_answer_is_right_and_nonsense_is_not(task):
    assert set(task.score(EXAMPLE, EXAMPLE.answer).values()) == {1.0}
    assert set(task.score(EXAMPLE, "\ufffd nonsense").values()) == {0.0}


def test_its_scores_are_listed_metrics(task):
    assert {f"eval.{name}" for name in task.score(EXAMPLE, "")} <= METRICS.keys()


def test_a_task_that_needs_no_answers_scores_none():
    for name in TASKS.names():
        if not TASKS.load(name).generates:
            with pytest.raises(NotImplementedError):
                TASKS.load(name)().score(EXAMPLE, "")
