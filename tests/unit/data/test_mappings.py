"""What each mapping makes of a row, and what it says of a row it cannot read."""

import json

import pytest

from lmray.data.base import Example, Row
from lmray.data.mappings.alpaca import Alpaca
from lmray.data.mappings.columns import Columns
from lmray.data.mappings.lmflow import KNOWN, Lmflow
from lmray.data.mappings.messages import Messages
from lmray.data.mappings.preference import Preference
from lmray.data.mappings.sharegpt import Sharegpt
from lmray.data.mappings.text import Text
from lmray.errors import DataError

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = ({"type": "function", "function": WEATHER},)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "東京"}}}
CONVERSATION = (
    {"role": "system", "content": "help"},
    {"role": "user", "content": "東京の天気は?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"sky": "clear"}'},
    {"role": "assistant", "content": "晴れ"},
)
ASKED, GOOD, BAD = ({"role": "user", "content": "2+2?"}, *({"role": "assistant", "content": text} for text in "45"))


def example(mapping, value) -> Example:
    return mapping.example(Row("f:7", value))


def changed(turn: int, **fields) -> dict:
    turns = [dict(one) for one in CONVERSATION]
    turns[turn].update(fields)
    return {"messages": turns}


AS_TEXT = {"name": "weather", "arguments": '{"city": "東京"}'}


@pytest.mark.parametrize(
    "value",
    [
        {"messages": list(CONVERSATION), "tools": list(TOOLS)},
        {"messages": list(CONVERSATION), "tools": [WEATHER]},
        {"messages": json.dumps(CONVERSATION), "tools": json.dumps(TOOLS)},
        changed(2, content=None) | {"tools": list(TOOLS)},
        changed(2, tool_calls=[AS_TEXT]) | {"tools": json.dumps([WEATHER])},
        changed(2, tool_calls=[{"function": AS_TEXT}], content="") | {"tools": list(TOOLS)},
        changed(4, tool_calls=None, weight=1) | {"tools": list(TOOLS)},
        changed(4, tool_calls=[], content=[{"type": "text", "text": "晴"}, {"type": "text", "text": "れ"}])
        | {"tools": list(TOOLS)},
    ],
)
def test_messages_with_tools_have_one_form(value):
    made = example(Messages(), value)
    assert (made.messages, made.tools) == (CONVERSATION, TOOLS)
    assert made.has_tools and made.answer == "晴れ" and made.prompt == CONVERSATION[:-1]


def test_ids_names_and_reasoning_of_turns_are_kept():
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", **CALL}], "reasoning_content": "think"},
        {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "one"},
    ]
    made = example(Messages(), {"messages": turns}).messages
    assert made[0] == turns[0] | {"content": ""} and made[1:] == tuple(turns[1:])


def test_a_call_without_arguments_has_none():
    turns = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now"}}]}]
    made = example(Messages(), {"messages": turns})
    assert made.messages[0]["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]


def test_an_answer_that_only_calls_is_compared_as_json():
    call = {"name": "weather", "arguments": {"city": "東京"}}
    one = example(Messages(), {"messages": list(CONVERSATION[:3])})
    two = example(Messages(), {"messages": [{"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}]})
    assert one.answer == json.dumps(call, ensure_ascii=False)
    assert json.loads(two.answer) == [call, call]


@pytest.mark.parametrize(
    ("value", "where", "message"),
    [
        (changed(1, tool_calls=[CALL]), "turn 2", "a turn of `user` calls tools"),
        (changed(2, tool_calls=[{"function": {"arguments": {}}}]), "turn 3", "names no function"),
        (changed(2, tool_calls=["weather"]), "turn 3", "names no function"),
        (changed(2, tool_calls=[{"name": "f", "arguments": "{"}]), "turn 3", "malformed JSON"),
        (changed(2, tool_calls=[{"name": "f", "arguments": [1]}]), "turn 3", "arguments of `f` are a list"),
        (changed(4, weight=0), "turn 5", "is marked `weight: 0`"),
        (changed(4, train=False), "turn 5", "is marked `train: False`"),
        (changed(3, content=None), "turn 4", "content is nothing"),
        (changed(4, content=[{"type": "image"}]), "turn 5", "content is a list"),
        (changed(0, role="sistem"), "turn 1", "role 'sistem'"),
        (changed(0) | {"tools": 3}, "column `tools`", "holds a int"),
        (changed(0) | {"tools": [{"type": "function"}]}, "tool 1", "without the name"),
        (changed(0) | {"tools": ["weather"]}, "tool 1", "a str"),
        ({"messages": "[{"}, "column `messages`", "malformed JSON"),
    ],
)
def test_malformed_turns_and_tools_are_named(value, where, message):
    with pytest.raises(DataError, match=message) as caught:
        example(Messages(), value)
    assert where in caught.value.where and caught.value.where.startswith("f:7: column `")


def test_the_nearest_role_and_column_are_named():
    with pytest.raises(DataError) as caught:
        example(Messages(), changed(0, role="sistem"))
    assert caught.value.hint == "did you mean `system`?"
    with pytest.raises(DataError, match="is missing") as caught:
        example(Messages(), {"mesages": []})
    assert caught.value.hint == "did you mean `mesages`?"


def test_sharegpt_gives_the_same_conversation():
    turns = [
        {"from": "human", "value": "東京の天気は?"},
        {"from": "function_call", "value": json.dumps(AS_TEXT)},
        {"from": "observation", "value": '{"sky": "clear"}'},
        {"from": "gpt", "value": "晴れ"},
    ]
    made = example(Sharegpt(), {"conversations": turns, "system": "help", "tools": json.dumps([WEATHER])})
    assert (made.messages, made.tools) == (CONVERSATION, TOOLS)
    inside = [{"from": "system", "value": "help"}, *turns]
    assert example(Sharegpt(), {"conversations": inside, "system": "other"}).messages == CONVERSATION


def test_sharegpt_with_tags_of_its_own():
    mapping = Sharegpt(conversations="dialog", role_tag="who", content_tag="says", user_tag="me", assistant_tag="you")
    made = example(mapping, {"dialog": [{"who": "me", "says": "2+2?"}, {"who": "you", "says": "4"}]})
    assert made.messages == (ASKED, GOOD)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"from": "robot", "value": "a"}], "from 'robot'"),
        ([{"from": "human", "value": "a"}], "ends with a turn of `user`"),
        ([{"from": "function_call", "value": "weather()"}], "names no function"),
        ([{"from": "function_call", "value": "[]"}], "calls no function"),
        ([], "an empty list"),
    ],
)
def test_malformed_sharegpt_is_named(turns, message):
    with pytest.raises(DataError, match=message) as caught:
        example(Sharegpt(), {"conversations": turns})
    assert caught.value.where.startswith("f:7: column `conversations`")


def test_alpaca_with_all_its_columns():
    row = {"instruction": "add", "input": "2+2?", "output": "4", "system": "count", "history": [["1+1?", "2"]]}
    made = example(Alpaca(), row).messages
    assert [turn["content"] for turn in made] == ["count", "1+1?", "2", "add\n2+2?", "4"]
    assert [turn["role"] for turn in made] == ["system", "user", "assistant", "user", "assistant"]
    assert example(Alpaca(), {"instruction": "2+2?", "input": "", "output": "4"}).messages == (ASKED, GOOD)


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        ({"history": "none"}, "history", "holds a str"),
        ({"history": [["a"]]}, "history`, pair 1", "no pair of texts"),
        ({"input": 3}, "input", "holds a int"),
        ({"output": None}, "output", "holds nothing"),
    ],
)
def test_malformed_alpaca_is_named(change, where, message):
    with pytest.raises(DataError, match=message) as caught:
        example(Alpaca(), {"instruction": "a", "output": "b", **change})
    assert where in caught.value.where


def test_columns_that_hold_turns():
    row = {"prompt": [ASKED], "completion": [GOOD], "system": "count"}
    assert example(Columns(), row).messages == (ASKED, GOOD)
    assert example(Columns(system="system"), row).messages[0] == {"role": "system", "content": "count"}
    with pytest.raises(DataError, match="ends with a turn of `user`"):
        example(Columns(), {"prompt": [ASKED], "completion": [ASKED]})


def test_lmflow_types():
    assert example(Lmflow(), {"type": "text_only", "text": "読む"}).text == "読む"
    assert example(Lmflow(), {"type": "text2text", "input": "2+2?", "output": "4"}).messages == (ASKED, GOOD)
    row = {"type": "conversation", "system": "help", "tools": [WEATHER], "messages": list(CONVERSATION[1:])}
    made = example(Lmflow(), row)
    assert (made.messages, made.tools) == (CONVERSATION, TOOLS)


@pytest.mark.parametrize("kind", [*KNOWN[3:], "text2txt", None])
def test_lmflow_types_that_are_not_read(kind):
    with pytest.raises(DataError, match=f"is {kind!r}") as caught:
        example(Lmflow(), {"type": kind, "text": "a"})
    assert caught.value.allowed == "text_only, text2text, conversation"


def test_text_is_no_conversation():
    made = example(Text(), {"text": "読む", "topic": 1})
    assert (made.text, made.messages, made.columns["topic"]) == ("読む", (), 1)
    for part in ("prompt", "answer"):
        with pytest.raises(DataError, match="no prompt and no answer") as caught:
            getattr(made, part)
        assert caught.value.where == "f:7"
    assert [Text().takes(Row("f:1", {"text": text})) for text in ("a", " \n", 3)] == [True, False, True]


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "2+2?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": [{"from": "human", "value": "2+2?"}], "chosen": {"from": "gpt", "value": "4"}, "rejected": BAD},
    ],
)
def test_preferences_as_pairs(value):
    made = example(Preference(), value)
    assert (made.messages, made.rejected, made.label) == ((ASKED, GOOD), (ASKED, BAD), None)
    assert made.is_preference
    chosen = example(Preference(use="chosen"), value)
    assert chosen.messages == (ASKED, GOOD) and not chosen.is_preference


def test_preferences_with_system_and_input():
    mapping = Preference(prompt="instruction", input="input", system="system")
    row = {"instruction": "add", "input": "2+2", "system": "count", "chosen": "4", "rejected": "5"}
    made = example(mapping, row)
    assert [turn["content"] for turn in made.messages] == ["count", "add\n2+2", "4"]
    assert made.rejected is not None and made.rejected[:2] == made.messages[:2]


@pytest.mark.parametrize("label", [False, "false", "FALSE"])
def test_preferences_with_labels(label):
    row = Row("f:7", {"prompt": "2+2?", "completion": "5", "label": label})
    made = Preference().example(row)
    assert (made.messages, made.rejected, made.label) == ((ASKED, BAD), None, False)
    assert Preference().takes(row) and not Preference(use="chosen").takes(row)
    good = Row("f:8", {"prompt": "2+2?", "completion": "4", "label": True})
    assert Preference(use="chosen").takes(good) and not Preference(use="chosen").example(good).is_preference


@pytest.mark.parametrize(
    ("value", "where", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "column `rejected`", "is missing"),
        ({"chosen": "b", "rejected": "c"}, "column `prompt`", "is missing"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "column `chosen`", "holds a int"),
        ({"chosen": [ASKED, GOOD], "rejected": [BAD]}, "column `prompt`", "is missing"),
        ({"chosen": [ASKED, GOOD], "rejected": [{**ASKED, "content": "?"}, BAD]}, "columns `ch", "different turns"),
        ({"prompt": "a", "completion": "b", "label": 0.5}, "column `label`", "holds a float"),
        ({"prompt": "a", "completion": [ASKED], "label": True}, "column `completion`", "ends with a turn of `user`"),
    ],
)
def test_malformed_preferences_are_named(value, where, message):
    with pytest.raises(DataError, match=message) as caught:
        example(Preference(), value)
    assert where in caught.value.where
