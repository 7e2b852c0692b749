"""Data sets by their id on the Hub: folders that stand for them, read by the real library without a network."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmray.config import Document, decode
from lmray.data.examples import read_examples
from lmray.data.sources import open_source
from lmray.data.spec import DataSpec
from lmray.errors import DataError
from lmray.testing.jobs import write_jsonl

CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
OTHER = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "g", "arguments": {"b": 2}}}]}
USER = {"role": "user", "content": "何?"}


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """`owner/qa` with two splits, `owner/parts` with two configurations; nothing else, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    qa = tmp_path / "owner" / "qa"
    qa.mkdir(parents=True)
    write_jsonl(qa / "train.jsonl", [{"prompt": f"q{index}", "completion": "a"} for index in range(3)])
    write_jsonl(qa / "test.jsonl", [{"prompt": "t", "completion": "b"}])
    parts = tmp_path / "owner" / "parts"
    parts.mkdir()
    listed = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("calls", "texts"))
    (parts / "README.md").write_text(f"---\nconfigs:\n{listed}---\n", encoding="utf-8")
    pq.write_table(
        pa.Table.from_pylist([{"messages": [USER, CALL]}, {"messages": [USER, OTHER]}]), parts / "calls.parquet"
    )
    pq.write_table(pa.Table.from_pylist([{"text": "a"}]), parts / "texts.parquet")


@pytest.mark.parametrize(
    ("source", "prompts"),
    [
        ("hf:owner/qa", ["q0", "q1", "q2"]),
        ("hf:owner/qa:test", ["t"]),
        ("hf:owner/qa:train[1:]", ["q1", "q2"]),
        ("hf:owner/qa:default:test", ["t"]),
    ],
)
def test_splits_are_read_row_by_row(source, prompts):
    assert [row.value["prompt"] for row in open_source(source, None).rows] == prompts


def test_no_progress_bar_is_drawn_where_nobody_sees_it_move(capfd):
    before = datasets.are_progress_bars_disabled()
    assert len(list(open_source("hf:owner/qa", None).rows)) == 3
    assert "split:" not in capfd.readouterr().err
    assert datasets.are_progress_bars_disabled() == before


def test_rows_are_named_by_data_set_split_and_number():
    assert [row.where for row in open_source("hf:owner/qa", None).rows] == [f"hf:owner/qa:train:{n}" for n in (1, 2, 3)]


def test_arguments_of_calls_are_those_that_were_written():
    spec = decode(DataSpec, Document("test", {"train": [{"source": "hf:owner/parts:calls:train"}]}))
    examples = read_examples(spec)
    arguments = [one.messages[1]["tool_calls"][0]["function"]["arguments"] for one in examples.train]
    assert arguments == [{"a": 1}, {"b": 2}]
    assert examples.formats == ("hf:owner/parts:calls:train: messages with tools; 2 rows, 2 an epoch",)


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("hf:owner/qa:tset", "Unknown split", "did you mean `test`?"),
        ("hf:owner/qa:x", "Unknown split", "train"),
        ("hf:owner/parts", "Config name is missing", "`:calls:train`"),
        ("hf:owner/parts:nope:train", "cannot be had", "calls"),
        ("hf:owner/absent", "cannot be had", "a file, a folder, a glob"),
    ],
)
def test_what_cannot_be_had_says_what_can(source, message, hint):
    with pytest.raises(DataError, match=message) as caught:
        open_source(source, None)
    assert caught.value.where == f"data source `{source}`"
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("source", ["hf:", "hf:a/b/c", "hf:../x:y:z:w", "hf:owner/qa:"])
def test_ids_that_are_none(source):
    with pytest.raises(DataError, match="no id of a data set"):
        open_source(source, None)
