import json

import pytest

from lmray.data.base import Example
from lmray.tasks.json_match import JsonMatch

ACCEPTED = {
    "name": "f",
    "arguments": {
        "city": ["Ha Noi, Vietnam", "Hanoi"],
        "count": [2, 3.0],
        "unit": ["", "cm"],
        "flag": [True, ""],
        "box": [{"x": [1, 2], "label": ["", "a"]}, ""],
        "path": [[[0, 1], [2, 3]], ""],
        "nothing": [],
    },
}
BASE = {"city": "Hanoi", "count": 2}


def score(arguments, name="f") -> dict[str, float]:
    example = Example(({"role": "user", "content": "q"}, {"role": "assistant", "content": "{}"}), "f:1", {}, ACCEPTED)
    return JsonMatch().score(example, json.dumps({"name": name, "arguments": arguments}))


@pytest.mark.parametrize(
    "arguments",
    [
        BASE,
        {**BASE, "city": "ha noi vietnam"},
        {**BASE, "count": 3},
        {**BASE, "unit": "cm", "flag": True},
        {**BASE, "box": {"x": 1}},
        {**BASE, "box": {"x": 2, "label": "A"}},
        {**BASE, "path": [[0, 1], [2, 3]]},
    ],
)
def test_any_accepted_value_counts(arguments):
    assert score(arguments) == {"json_match": 1.0, "json_name_match": 1.0}


@pytest.mark.parametrize(
    "arguments",
    [
        {"city": "Hanoi"},
        {**BASE, "count": "2"},
        {**BASE, "count": True},
        {**BASE, "flag": 1},
        {**BASE, "more": 1},
        {**BASE, "box": {"x": 3}},
        {**BASE, "box": {"x": 1, "z": 1}},
        {**BASE, "path": [[0, 1]]},
        {**BASE, "nothing": 1},
        [],
        None,
    ],
)
def test_anything_else_is_wrong_but_the_name_may_still_be_right(arguments):
    assert score(arguments) == {"json_match": 0.0, "json_name_match": 1.0}


def test_another_name_or_no_json_matches_nothing():
    nothing = {"json_match": 0.0, "json_name_match": 0.0}
    assert score(BASE, name="g") == nothing
    example = Example(({"role": "assistant", "content": "{}"},), "f:1", {}, ACCEPTED)
    assert JsonMatch().score(example, "I would call f.") == nothing
    assert JsonMatch().score(example, "[1]") == nothing


def test_without_accepted_values_the_answer_is_the_one_right_value():
    example = Example(({"role": "assistant", "content": '{"a": [1, "X y"]}'},), "f:1")
    assert JsonMatch().score(example, ' {"a": [1.0, "xy"]} ') == {"json_match": 1.0}
    assert JsonMatch().score(example, '{"a": [1]}') == {"json_match": 0.0}


def test_an_expected_answer_that_is_no_json_is_never_matched():
    example = Example(({"role": "user", "content": "q"}, {"role": "assistant", "content": "red 1"}), "f:1")
    assert JsonMatch().score(example, "5") == {"json_match": 0.0}
