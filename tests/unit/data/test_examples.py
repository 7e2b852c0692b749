from dataclasses import replace

import pytest

from lmray.config import Document, decode
from lmray.data.base import Example, Row
from lmray.data.detect import detect
from lmray.data.examples import Examples, read_examples
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
    assert detect([Row("f:1", {"messages": []})]).mapping.name == "messages"
    assert detect([Row("f:1", {"prompt": "", "completion": "", "more": 1})]).mapping.name == "columns"
    with pytest.raises(DataError, match="columns question, reply") as caught:
        detect([Row("f:1", {"question": "", "reply": ""})])
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


def test_a_wrong_column_in_the_job_names_the_nearest(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "a", "answer": "b"}])
    source = {"source": str(path), "mapping": {"prompt": "qestion", "completion": "answer"}}
    with pytest.raises(DataError, match="is missing") as caught:
        read_examples(spec(path, train=[source]))
    assert caught.value.where == f"{path}:1: column `qestion`"
    assert (caught.value.allowed, caught.value.hint) == ("question, answer", "did you mean `question`?")


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


def mixture(first, second, **more) -> DataSpec:
    sources = [{"source": str(path), "weight": weight} for path, weight in (first, second)]
    return decode(DataSpec, Document("test", {"train": sources, **more}))


def test_a_mixture_holds_out_first_and_weighs_the_rest_of_each_source(tmp_path):
    big = write_jsonl(tmp_path / "big.jsonl", tiny_rows(40))
    small = write_jsonl(tmp_path / "small.jsonl", tiny_rows(10))
    examples = read_examples(mixture((big, 0.25), (small, 2.5), eval={"split": 0.2}))
    held = {path: sum(str(path) in one.where for one in examples.eval) for path in (big, small)}
    assert sum(held.values()) == 10
    counts = [sum(str(path) in one.where for one in examples.train) for path in (big, small)]
    expected = [((40 - held[big]) + 2) // 4, (5 * (10 - held[small]) + 1) // 2]
    assert counts == expected
    assert not {one.where for one in examples.train} & {one.where for one in examples.eval}
    assert examples.formats == (
        f"{big}: columns; 40 rows, {held[big]} held out, {counts[0]} an epoch (weight 0.25)",
        f"{small}: columns; 10 rows, {held[small]} held out, {counts[1]} an epoch (weight 2.5)",
    )


@pytest.mark.parametrize(
    ("weight", "places"),
    [
        (1.0, [0, 1, 2, 3, 4, 5]),
        (0.5, [0, 2, 4]),
        (0.34, [0, 3]),
        (1.5, [0, 1, 2, 3, 4, 5, 0, 2, 4]),
        (2.0, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]),
        (0.25, [0, 3]),  # 1.5 rounds up
        (1.1, [0, 1, 2, 3, 4, 5, 0]),
    ],
)
def test_a_fraction_takes_examples_at_even_distances(tmp_path, weight, places):
    path = write_jsonl(tmp_path / "x.jsonl", tiny_rows(6))
    train = read_examples(spec(path, train=[{"source": str(path), "weight": weight}])).train
    assert [int(one.where.rpartition(":")[2]) - 1 for one in train] == places


def test_the_split_does_not_depend_on_the_weights(tmp_path):
    big, small = (write_jsonl(tmp_path / f"{count}.jsonl", tiny_rows(count)) for count in (40, 10))
    held = [
        read_examples(mixture((big, weight), (small, 1.0), eval={"split": 0.3, "by": "topic"})).eval
        for weight in (1.0, 0.3)
    ]
    assert list(held[0]) == list(held[1])


def test_a_weight_that_leaves_nothing_is_refused(tmp_path, tiny_data):
    path = write_jsonl(tmp_path / "x.jsonl", tiny_rows(4))
    with pytest.raises(DataError, match=r"`weight: 0.1` of 4 example\(s\) leaves none"):
        read_examples(mixture((tiny_data, 1.0), (path, 0.1)))


def test_held_out_data_has_no_weights(tiny_data):
    with pytest.raises(ConfigError, match="has no weights"):
        spec(tiny_data, eval={"sources": [{"source": str(tiny_data), "weight": 2.0}]})


def test_held_out_sources_stand_in_the_plan(tiny_data):
    examples = read_examples(spec(tiny_data, eval={"sources": [{"source": str(tiny_data)}]}))
    assert examples.formats == (
        f"{tiny_data}: columns; 24 rows, 24 an epoch",
        f"{tiny_data}: columns; 24 rows, 24 held out",
    )


def test_tools_text_and_rejected_answers_change_the_digest_and_nothing_else_does(tmp_path):
    plain = Example(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), "f:1")
    others = [
        replace(plain, tools=({"type": "function", "function": {"name": "f"}},)),
        replace(plain, text="a"),
        replace(plain, rejected=plain.messages),
        replace(plain, label=False),
        replace(plain, accepted={"name": "f"}),
    ]
    digests = [Examples((one,), (), ()).digest for one in (plain, *others)]
    assert len(set(digests)) == 6
    assert Examples((replace(plain, where="g:9", columns={"x": 1}),), (), ("line",)).digest == digests[0]
    assert digests[0] == "0afaf9227544e14fcf7b2c0570c77b29f2bcd6a835f6757d5fe64f6ec32c6832", (
        "runs made before these fields existed keep their keys"
    )
