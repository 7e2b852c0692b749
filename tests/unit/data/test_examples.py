import pytest

from lmray.config import Document, decode
from lmray.data.base import Row
from lmray.data.examples import detect_mapping, read_examples
from lmray.data.spec import DataSpec
from lmray.errors import ConfigError, DataError
from lmray.testing.jobs import tiny_rows, write_jsonl


def spec(path, **changes) -> DataSpec:
    return decode(DataSpec, Document("test", {"train": [{"source": str(path)}], **changes}))


def test_a_split_by_column_shares_no_value_and_loses_no_row(tiny_data):
    examples = read_examples(spec(tiny_data, eval={"split": 0.25, "by": "topic"}))
    topics = [{example.columns["topic"] for example in part} for part in (examples.train, examples.eval)]
    assert topics[0] and topics[1] and not topics[0] & topics[1]
    assert len(examples.train) + len(examples.eval) == len(tiny_rows())
    assert 0.25 <= len(examples.eval) / len(tiny_rows()) < 0.5


def test_a_split_is_the_same_again_and_another_with_another_seed(tiny_data):
    def held_out(seed):
        return [one.where for one in read_examples(spec(tiny_data, eval={"split": 0.5, "seed": seed})).eval]

    assert held_out(0) == held_out(0) != held_out(1)
    assert len(held_out(0)) == 12


def test_weights_repeat_and_thin_out(tiny_data):
    def count(weight):
        return len(read_examples(spec(tiny_data, train=[{"source": str(tiny_data), "weight": weight}])).train)

    assert [count(weight) for weight in (0.5, 1.0, 2.25)] == [12, 24, 54]


def test_held_out_files_of_their_own(tiny_data, tmp_path):
    other = write_jsonl(tmp_path / "held.jsonl", tiny_rows(3))
    examples = read_examples(spec(tiny_data, eval={"sources": [{"source": str(other)}]}))
    assert (len(examples.train), len(examples.eval)) == (24, 3)


def test_formats_are_detected_from_the_first_row():
    assert detect_mapping(Row("f:1", {"messages": []})).name == "messages"
    assert detect_mapping(Row("f:1", {"prompt": "", "completion": "", "more": 1})).name == "columns"
    with pytest.raises(DataError, match="columns question, reply") as caught:
        detect_mapping(Row("f:1", {"question": "", "reply": ""}))
    assert "mapping:" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "where", "message"),
    [
        ({"prompt": "a"}, ":2: column `completion`", "is missing"),
        ({"prompt": "a", "completion": 3}, ":2: column `completion`", "holds a int"),
    ],
)
def test_a_row_of_the_wrong_shape_is_named(tmp_path, row, where, message):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}, row])
    with pytest.raises(DataError, match=message) as caught:
        read_examples(spec(path))
    assert caught.value.where == f"{path}{where}"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("text", "holds a str"),
        ([], "an empty list"),
        ([{"role": "human", "content": "a"}], "role 'human'"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "content is nothing"),
        ([{"role": "user", "content": "a"}], "ends with a turn of `user`"),
        (["hello"], "a str"),
    ],
)
def test_malformed_conversations_are_named(tmp_path, messages, message):
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=message) as caught:
        read_examples(spec(path))
    assert f"{path}:1: column `messages`" in caught.value.where


def test_empty_data_and_an_empty_rest_are_refused(tmp_path, tiny_data):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="is empty"):
        read_examples(spec(empty))
    with pytest.raises(DataError, match="no example is left"):
        read_examples(
            spec(tiny_data, train=[{"source": str(tiny_data), "mapping": {"prompt": "topic"}}], eval={"split": 0.999})
        )


def test_an_unknown_column_to_split_by(tiny_data):
    with pytest.raises(ConfigError, match="no column `nope`") as caught:
        read_examples(spec(tiny_data, eval={"split": 0.2, "by": "nope"}))
    assert "topic" in str(caught.value)


def test_the_digest_follows_the_content(tiny_data, tmp_path):
    same = write_jsonl(tmp_path / "copy.jsonl", tiny_rows())
    other = write_jsonl(tmp_path / "other.jsonl", tiny_rows(23))
    digests = [read_examples(spec(path)).digest for path in (tiny_data, same, other)]
    assert digests[0] == digests[1] != digests[2]
