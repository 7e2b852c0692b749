"""Which mapping a source gets when the job names none."""

import pytest

from lmray.config import Document, decode
from lmray.data.base import Row
from lmray.data.detect import detect
from lmray.data.examples import read_examples
from lmray.data.mappings.messages import Messages
from lmray.data.mappings.preference import Preference
from lmray.data.mappings.sharegpt import Sharegpt
from lmray.data.spec import DataSpec
from lmray.errors import DataError
from lmray.testing.jobs import write_jsonl

MESSAGES = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
ALPACA = {"instruction": "a", "input": "", "output": "b"}
COLUMNS = {"prompt": "a", "completion": "b"}


def spec(path, **source) -> DataSpec:
    return decode(DataSpec, Document("test", {"train": [{"source": str(path), **source}]}))


@pytest.mark.parametrize(
    ("value", "mapping", "also"),
    [
        (MESSAGES, Messages(), ()),
        (MESSAGES | {"text": "rendered"}, Messages(), ("text",)),
        ({"conversations": SHARED}, Sharegpt(), ()),
        ({"messages": SHARED}, Sharegpt(conversations="messages"), ()),
        ({"conversations": MESSAGES["messages"]}, Messages(column="conversations"), ()),
        (
            {"conversations": SHARED[:1], "chosen": SHARED[1], "rejected": SHARED[1]},
            Preference(prompt="conversations"),
            (),
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, Preference(), ()),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, Preference(prompt="instruction", input="input"), ()),
        (COLUMNS | {"label": True}, Preference(), ("columns",)),
        (COLUMNS | {"label": "true"}, Preference(), ("columns",)),
    ],
)
def test_the_most_telling_columns_decide(value, mapping, also):
    reading = detect([Row("f:1", value)] * 3)
    assert (reading.mapping, reading.also) == (mapping, also)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (ALPACA, "alpaca"),
        ({"instruction": "a", "output": ""}, "alpaca"),
        (COLUMNS, "columns"),
        (COLUMNS | {"label": 3}, "columns"),
        (COLUMNS | {"messages": None, "label": None}, "columns"),
        ({"text": "a"}, "text"),
        ({"type": "text_only", "text": "a"}, "lmflow"),
        ({"type": "float_only", "text": "a"}, "lmflow"),
        ({"type": "news", "text": "a"}, "text"),
    ],
)
def test_names_of_what_is_found(value, name):
    assert detect([Row("f:1", value)]).mapping.name == name


def test_another_reading_is_told_only_where_it_fits_all_rows():
    rows = [Row("f:1", MESSAGES | {"text": "a"}), Row("f:2", MESSAGES)]
    assert detect(rows).also == ()


def test_unknown_columns_name_the_nearest_that_are_known():
    with pytest.raises(DataError, match="columns instrution, output") as caught:
        detect([Row("f:1", {"instrution": "a", "output": "b"})])
    assert "column `instrution`: did you mean `instruction`?" in str(caught.value)
    with pytest.raises(DataError, match="columns none"):
        detect([Row("f:1", {})])


@pytest.mark.parametrize("place", [2, 20, 21, 300])
def test_a_row_of_another_format_is_named_wherever_it_stands(tmp_path, place):
    rows = [MESSAGES] * (place - 1) + [ALPACA] + [MESSAGES] * 3
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match="in the format `alpaca`, the rows before it in `messages`") as caught:
        read_examples(spec(path))
    assert caught.value.where == f"{path}:{place}"


@pytest.mark.parametrize("place", [1, 2, 20, 21, 300])
def test_a_bad_row_is_found_wherever_it_stands(tmp_path, place):
    rows = [COLUMNS] * (place - 1) + [COLUMNS | {"completion": 3}] + [COLUMNS] * 3
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match="holds a int") as caught:
        read_examples(spec(path))
    assert caught.value.where == f"{path}:{place}: column `completion`"


def test_a_file_of_another_format_in_a_folder_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [MESSAGES] * 30)
    other = write_jsonl(tmp_path / "b.jsonl", [COLUMNS])
    with pytest.raises(DataError, match="format `columns`") as caught:
        read_examples(spec(tmp_path))
    assert caught.value.where == f"{other}:1"


def test_a_named_mapping_is_not_second_guessed(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [MESSAGES | COLUMNS, ALPACA | COLUMNS])
    assert len(read_examples(spec(path, mapping="columns")).train) == 2


def test_the_plan_says_what_was_found(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    rows = [MESSAGES | {"text": "t"}, {"messages": [MESSAGES["messages"][0], call], "text": "t"}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    (line,) = read_examples(spec(path)).formats
    assert line == f"{path}: messages with tools, could also be read as text; 2 rows, 2 an epoch"


def test_preferences_are_not_trained_on_by_supervision_unless_the_job_says_so(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match="is a preference") as caught:
        read_examples(spec(path))
    assert caught.value.where == f"{path}:1" and "use: chosen" in str(caught.value)
    chosen = read_examples(spec(path, mapping={"name": "preference", "use": "chosen"}))
    assert [turn["content"] for turn in chosen.train[0].messages] == ["a", "b"]
    pairs = read_examples(spec(path), preferences=True)
    assert pairs.train[0].rejected is not None
    assert pairs.digest != chosen.digest


def test_labels_that_are_false_are_left_out_of_supervision(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [COLUMNS | {"label": False}, COLUMNS | {"label": True}])
    with pytest.raises(DataError, match="is a preference"):
        read_examples(spec(path))
    chosen = read_examples(spec(path, mapping={"name": "preference", "use": "chosen"}))
    assert [one.where for one in chosen.train] == [f"{path}:2"]


def test_blank_text_is_passed_over_but_not_in_silence(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": " "}, {"text": "a"}, {"text": ""}])
    examples = read_examples(spec(path))
    assert [one.text for one in examples.train] == ["a"]
    assert examples.formats == (f"{path}: text; 1 rows, 2 more passed over, 1 an epoch",)
    blank = write_jsonl(tmp_path / "blank.jsonl", [{"text": " "}])
    with pytest.raises(DataError, match="no row that the mapping `text` takes"):
        read_examples(spec(blank))
