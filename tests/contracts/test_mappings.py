"""What every mapping keeps to."""

from __future__ import annotations

from copy import deepcopy

import pytest

from lmray.config import Document, decode, dump
from lmray.data.base import Row
from lmray.data.spec import DataSource
from lmray.data.turns import ROLES
from lmray.errors import DataError
from lmray.registry import MAPPINGS

ASKED, ANSWERED = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
ROWS = {
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
    "bfcl": {
        "id": "simple_0",
        "question": [[{"role": "user", "content": "2+2?"}]],
        "function": [{"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}],
        "ground_truth": [{"add": {"a": [2]}}],
    },
    "columns": {"prompt": "2+2?", "completion": "4"},
    "lmflow": {"type": "text2text", "input": "2+2?", "output": "4"},
    "messages": {"messages": [ASKED, ANSWERED]},
    "preference": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "text": {"text": "2+2 is 4"},
}
"""A good row for each; a new mapping adds its own."""


@pytest.fixture(params=MAPPINGS.names())
def mapping(request):
    return MAPPINGS.load(request.param)()


def test_a_good_row_becomes_a_conversation_or_a_text(mapping):
    row = Row("file.jsonl:7", ROWS[mapping.name] | {"topic": "sums"})
    assert mapping.takes(row)
    example = mapping.example(row)
    assert example.where == "file.jsonl:7"
    assert (example.text is None) == bool(example.messages)
    if example.messages:
        assert {message["role"] for message in example.messages} <= set(ROLES)
        assert all(isinstance(message["content"], str) for message in example.messages)
        assert example.messages[-1]["role"] == "assistant" and example.answer


def test_a_row_is_read_and_not_changed(mapping):
    row = Row("file.jsonl:7", deepcopy(ROWS[mapping.name]))
    assert mapping.example(row) == mapping.example(row)
    assert row.value == ROWS[mapping.name]


def test_columns_that_it_does_not_read_are_there_to_split_by(mapping):
    example = mapping.example(Row("file.jsonl:7", ROWS[mapping.name] | {"topic": "sums"}))
    assert example.columns["topic"] == "sums"


@pytest.mark.parametrize("value", [{}, {"messages": 3, "prompt": 3, "question": 3}])
def test_a_row_of_another_shape_is_named(mapping, value):
    with pytest.raises(DataError) as caught:
        mapping.example(Row("file.jsonl:7", value))
    assert caught.value.where.startswith("file.jsonl:7") and caught.value.exit_code == 2


@pytest.mark.parametrize("cell", [3, None, [], {}, [3], [[]], [{}], "", "[", True])
def test_odd_cells_are_read_or_refused_and_never_break_it(mapping, cell):
    """Whatever one column holds, the outcome is an example or a DataError with the row."""
    for column in ROWS[mapping.name]:
        row = Row("file.jsonl:7", ROWS[mapping.name] | {column: cell})
        try:
            if mapping.takes(row):
                mapping.example(row)
        except DataError as error:
            assert error.where.startswith("file.jsonl:7")


def test_it_is_named_in_a_job_by_its_file(mapping):
    source = decode(DataSource, Document("test", {"source": "x.jsonl", "mapping": mapping.name}))
    assert source.mapping == mapping
    assert decode(DataSource, Document("test", dump(source))) == source
