import json

import pytest

from lmray.data.base import Row
from lmray.data.files import read_rows
from lmray.data.mappings.bfcl import Bfcl
from lmray.errors import DataError
from lmray.tasks.json_match import JsonMatch

QUESTION = {
    "id": "q1",
    "question": [[{"role": "user", "content": "Ride from 東京 駅"}]],
    "function": [
        {
            "name": "ride",
            "description": "Finds a ride.",
            "parameters": {
                "type": "dict",
                "required": ["loc"],
                "properties": {
                    "loc": {"type": "string", "description": "Where."},
                    "kind": {"type": "string", "enum": ["plus", "black"], "description": "Which."},
                    "stops": {"type": "array", "items": {"type": "string"}, "description": "Between."},
                },
            },
        }
    ],
}
ANSWER = {"id": "q1", "ground_truth": [{"ride": {"loc": ["東京駅", "Tokyo"], "kind": ["", "plus"], "stops": [["a"]]}}]}


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "data"
    (folder / "possible_answer").mkdir(parents=True)
    (folder / "x.json").write_text(json.dumps(QUESTION), encoding="utf-8")
    (folder / "possible_answer" / "x.json").write_text(json.dumps(ANSWER), encoding="utf-8")
    return (folder / "x.json",)


def test_a_question_becomes_functions_request_and_call(files):
    (row,) = Bfcl().rows(files, read_rows)
    example = Bfcl().example(row)
    system, user, assistant = example.messages
    assert '"kind?": "one of [\\"plus\\", \\"black\\"]: Which."' in system["content"]
    assert user["content"] == "Ride from 東京 駅"
    assert json.loads(assistant["content"]) == {"name": "ride", "arguments": {"loc": "東京駅", "stops": ["a"]}}
    assert example.columns["function"] == "ride"
    assert JsonMatch().score(example, example.answer) == {"json_match": 1.0, "json_name_match": 1.0}


def test_rows_of_another_kind_are_refused():
    with pytest.raises(DataError, match="no single-call question"):
        Bfcl().example(Row("f:1", {"question": "x"}))
    with pytest.raises(DataError, match="no single-call question"):
        Bfcl().example(Row("f:1", {**QUESTION, "ground_truth": None}))
