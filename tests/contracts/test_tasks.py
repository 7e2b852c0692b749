"""What every task keeps to."""

from __future__ import annotations

import pytest

from lmray.data.base import Example
from lmray.metrics.names import METRICS
from lmray.registry import TASKS
from lmray.tasks.base import Scored

EXAMPLE = Example(
    ({"role": "user", "content": "q"}, {"role": "assistant", "content": '{"a": 1}'}),
    "file:1",
    {"choices": ['{"a": 1}', "nonsense"]},
)
NONSENSE = "\ufffd nonsense"


def members(needs: str) -> list[str]:
    return [name for name in TASKS.names() if TASKS.load(name).needs == needs]


@pytest.fixture(params=members("answers"))
def task(request):
    return TASKS.load(request.param)().for_examples([EXAMPLE])


@pytest.fixture(params=members("choices"))
def choosing(request):
    return TASKS.load(request.param)().for_examples([EXAMPLE])


def scored(task, answer: str) -> Scored:
    return Scored(EXAMPLE.answer, answer, task.score(EXAMPLE, answer), task.statistics(EXAMPLE, answer))


def test_the_expected_answer_is_right_and_nonsense_is_not(task):
    for answer, value in ((EXAMPLE.answer, 1.0), (NONSENSE, 0.0), ("", 0.0)):
        assert set(task.score(EXAMPLE, answer).values()) == {value}
        assert set(task.aggregate([scored(task, answer)] * 3).values()) == {value}


def test_half_right_answers_are_half_way(task):
    value = task.aggregate([scored(task, EXAMPLE.answer), scored(task, NONSENSE)])
    assert all(0.0 < one < 1.0 for one in value.values())


def test_its_scores_are_its_metrics_and_listed(task):
    names = task.score(EXAMPLE, "").keys()
    assert names and {f"eval.{name}" for name in names} <= METRICS.keys()
    assert task.aggregate([scored(task, "")]).keys() == names


def test_the_likeliest_choice_counts(choosing):
    assert choosing.choices(EXAMPLE) == (EXAMPLE.answer, "nonsense")
    for values, right in (([-1.0, -9.0], 1.0), ([-9.0, -1.0], 0.0)):
        scores = choosing.score_choices(EXAMPLE, values)
        assert set(scores.values()) == {right}
        assert {f"eval.{name}" for name in scores} <= METRICS.keys()
        assert choosing.aggregate([Scored(EXAMPLE.answer, "", scores)]) == scores


@pytest.mark.parametrize("name", TASKS.names())
def test_a_task_refuses_what_it_does_not_need(name):
    task = TASKS.load(name).model_construct()
    if task.needs != "model":
        with pytest.raises(NotImplementedError, match=name):
            task.run(None, None, batch_size=1)
    if task.needs != "answers":
        with pytest.raises(NotImplementedError, match=name):
            task.score(EXAMPLE, "")
    if task.needs != "choices":
        with pytest.raises(NotImplementedError, match=name):
            task.choices(EXAMPLE)
        with pytest.raises(NotImplementedError, match=name):
            task.score_choices(EXAMPLE, [])


@pytest.mark.parametrize("name", members("loss"))
def test_a_loss_is_over_all_tokens_not_a_mean_of_means(name):
    few, many = Scored("", "", {}, (3.0, 1)), Scored("", "", {}, (9.0, 5))
    assert TASKS.load(name)().aggregate([few, many])["loss"] == 2.0
