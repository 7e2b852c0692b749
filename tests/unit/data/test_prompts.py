"""Rows that are to be answered: with and without the answers that data brings, in their order."""

from __future__ import annotations

import pytest

from lmray.config import Document, decode
from lmray.data.prompts import read_questions
from lmray.data.spec import PromptSpec
from lmray.errors import DataError
from lmray.testing.jobs import write_jsonl

ASKED, ANSWERED = {"role": "user", "content": "2+2は?"}, {"role": "assistant", "content": "4"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
TURN = {"from": "human", "value": "2+2は?"}


def spec(*sources: object, **fields) -> PromptSpec:
    return decode(PromptSpec, Document("test", {"sources": [{"source": str(one)} for one in sources], **fields}))


@pytest.fixture
def rows(tmp_path):
    """Writes rows to a file of their own."""

    def write(*values: dict, name: str = "問い.jsonl"):
        return write_jsonl(tmp_path / name, list(values))

    return write


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED]},
        {"messages": [ASKED, ANSWERED]},
        {"prompt": "2+2は?"},
        {"prompt": [ASKED]},
        {"prompt": "2+2は?", "completion": "4"},
        {"instruction": "2+2は?"},
        {"instruction": "2+2は?", "input": "", "output": "4"},
        {"conversations": [TURN]},
        {"conversations": [TURN, {"from": "gpt", "value": "4"}]},
        {"prompt": "2+2は?", "chosen": "4", "rejected": "5"},
        {"type": "text2text", "input": "2+2は?", "output": "4"},
    ],
    ids=lambda row: "+".join(row),
)
def test_a_row_is_asked_without_the_answer_it_may_have(rows, row):
    (question,) = read_questions(spec(rows(row)))
    assert question.prompt.messages == (ASKED,) and question.prompt.text is None


def test_tools_and_system_messages_are_asked_with(rows):
    tools = rows({"messages": [ASKED], "tools": [TOOL]}, name="a.jsonl")
    system = rows({"q": "2+2は?", "s": "短く"}, name="b.jsonl")
    tree = {"sources": [{"source": str(tools)}, {"source": str(system), "mapping": {"prompt": "q", "system": "s"}}]}
    first, second = read_questions(decode(PromptSpec, Document("test", tree)))
    assert first.prompt.tools == (TOOL,)
    assert second.prompt.messages == ({"role": "system", "content": "短く"}, ASKED)


def test_plain_text_is_gone_on_with(rows):
    questions = read_questions(spec(rows({"text": "昔々"}, {"text": " "}, {"text": "Once"})))
    assert [one.prompt.text for one in questions] == ["昔々", "Once"] and not questions.has_chats


def test_rows_keep_their_order_ids_adapters_and_places(rows):
    path = rows(
        *({"prompt": f"q{index}", "key": index, "who": "ab"[index % 2] if index else None} for index in range(5))
    )
    questions = read_questions(spec(path, id="key", adapter="who"))
    assert [one.prompt.messages[0]["content"] for one in questions] == ["q0", "q1", "q2", "q3", "q4"]
    assert [one.id for one in questions] == ["0", "1", "2", "3", "4"]
    assert [one.adapter for one in questions] == [None, "b", "a", "b", "a"]
    assert questions.adapters == {"b": f"{path}:2", "a": f"{path}:3"}
    assert questions[3].prompt.where == f"{path}:4" and questions.formats == (f"{path}: columns; 5 rows",)


def test_max_rows_are_the_first_over_all_sources(rows):
    first = rows({"prompt": "a"}, {"prompt": "b"}, name="1.jsonl")
    second = rows({"prompt": "c"}, {"prompt": "d"}, name="2.jsonl")
    asked = [one.prompt.messages[0]["content"] for one in read_questions(spec(first, second, max_rows=3))]
    assert asked == ["a", "b", "c"]
    assert len(read_questions(spec(first, second, max_rows=2))) == 2


def test_the_digest_is_of_what_is_asked_wherever_it_stands(rows):
    digest = read_questions(spec(rows({"prompt": "a"}, name="1.jsonl"))).digest
    assert read_questions(spec(rows({"prompt": "a", "more": 1}, name="2.jsonl"))).digest == digest
    assert read_questions(spec(rows({"prompt": "b"}, name="3.jsonl"))).digest != digest
    changed = rows({"prompt": "c"}, name="1.jsonl")
    assert read_questions(spec(changed)).digest != digest, "a file that changed is read again"


@pytest.mark.parametrize(
    ("row", "fields", "said"),
    [
        ({"promt": "a"}, {}, "did you mean `prompt`"),
        ({"column": "a"}, {}, r"allowed: `messages`, `conversations`, `instruction`, `prompt`, or `text`"),
        ({"prompt": 3}, {}, "column `prompt`: holds a int"),
        ({"messages": [ANSWERED]}, {}, "holds an answer and no question"),
        ({"prompt": "a", "key": 1}, {"id": "kye"}, "column `kye`: is missing"),
        ({"prompt": "a", "who": ["x"]}, {"adapter": "who"}, "column `who`: holds a list"),
    ],
    ids=["near", "unknown", "number", "answer", "no-id", "adapters"],
)
def test_what_cannot_be_asked_is_told_with_its_place(rows, row, fields, said):
    with pytest.raises(DataError, match=said) as raised:
        read_questions(spec(rows(row), **fields))
    assert "問い.jsonl:1" in str(raised.value)


def test_a_row_in_another_format_is_told(rows):
    path = rows(*[{"prompt": "a"}] * 25, {"messages": [ASKED]})
    with pytest.raises(DataError, match="the rows before it in `columns`"):
        read_questions(spec(path))


def test_no_rows_are_told(rows, tmp_path):
    with pytest.raises(DataError, match="is empty: no row in it"):
        read_questions(spec(rows()))
    with pytest.raises(DataError, match="has no row that the mapping `text` takes"):
        read_questions(spec(rows({"text": " "}, name="blank.jsonl")))
    with pytest.raises(DataError, match="no such file"):
        read_questions(spec(tmp_path / "nowhere.jsonl"))
