from __future__ import annotations

import pytest

from lmray.errors import DataError
from lmray.tasks.multiple_choice import MultipleChoice


def test_length_normalised_or_not(example):
    one = example("a long answer", choices=["no", "a long answer"])
    assert MultipleChoice().score_choices(one, [-4.0, -6.5]) == {"multiple_choice": 0.0, "multiple_choice_norm": 1.0}


def test_bytes_make_length_the_same_in_every_script(example):
    one = example("東京", choices=["東京", "tokyo!"])  # six bytes each
    assert MultipleChoice().score_choices(one, [-3.0, -3.5])["multiple_choice_norm"] == 1.0


def test_the_answer_may_be_a_label(example):
    one = example("B", options={"text": ["cat", "dog"], "label": ["A", "B"]})
    task = MultipleChoice(column="options")
    assert task.choices(one) == ("cat", "dog")
    assert task.score_choices(one, [-2.0, -1.0])["multiple_choice"] == 1.0


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"other": []}, "is missing"),
        ({"choices": "cat"}, "holds cat"),
        ({"choices": ["cat"]}, "holds \\['cat'\\]"),
        ({"choices": ["cat", "cat"]}, "holds"),
        ({"choices": ["cat", ""]}, "holds"),
        ({"choices": {"label": ["A"]}}, "holds"),
        ({"choices": {"text": ["cat", "dog"], "label": ["A"]}}, "2 texts with labels"),
        ({"choices": ["fish", "dog"]}, "`cat` is no choice"),
    ],
)
def test_what_is_no_choice_is_named_with_its_row(example, columns, found):
    with pytest.raises(DataError, match=found) as caught:
        MultipleChoice().choices(example("cat", row=3, **columns))
    assert caught.value.where == "f.jsonl:3: column `choices`"
