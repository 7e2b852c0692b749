"""Examples on disk: read once, whole or not at all, and never more of them in memory than are in use."""

from __future__ import annotations

import datetime
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmray.config import Document, decode
from lmray.config.places import cache_root
from lmray.data import cache, examples, sources
from lmray.data.base import Row
from lmray.data.batch import pack
from lmray.data.cache import tokenise_cached
from lmray.data.examples import read_examples
from lmray.data.mappings.bfcl import Bfcl
from lmray.data.mappings.columns import Columns
from lmray.data.rules import Rules
from lmray.data.sources import OpenSource, open_source
from lmray.data.spec import DataSpec
from lmray.data.stored import Pool, PoolMaker
from lmray.data.tokenise import tokenise_all
from lmray.errors import CapacityError, DataError
from lmray.testing.jobs import tiny_rows, write_jsonl
from lmray.testing.tiny import tiny_tokenizer

RULES = Rules(max_length=60)


def spec(path, *, weight: float = 1.0, **changes) -> DataSpec:
    return decode(DataSpec, Document("test", {"train": [{"source": str(path), "weight": weight}], **changes}))


@pytest.fixture
def rows_read(monkeypatch) -> list[str]:
    """The place of every row that was read out of a file."""
    read, read_rows = [], sources.read_rows

    def noting(path, shown):
        for row in read_rows(path, shown):
            read.append(row.where)
            yield row

    monkeypatch.setattr(sources, "read_rows", noting)
    return read


def entries(kind: str) -> list[str]:
    folder = cache_root() / kind
    return [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def test_examples_are_those_that_the_mapping_makes_of_the_rows(tiny_data):
    found = read_examples(spec(tiny_data)).train
    made = [Columns().example(row) for row in open_source(str(tiny_data), None).rows]
    assert list(found) == made and found[-1] == made[-1] and found[3:5] == made[3:5]
    assert [one.columns for one in found] == tiny_rows()


def test_what_was_read_is_not_read_again_until_it_changes(tiny_data, rows_read):
    first = read_examples(spec(tiny_data, eval={"split": 0.25}))
    again = read_examples(spec(tiny_data, eval={"split": 0.25}))
    assert len(rows_read) == 24
    assert (list(again.train), list(again.eval)) == (list(first.train), list(first.eval))
    assert (again.digest, again.formats) == (first.digest, first.formats)
    write_jsonl(tiny_data, tiny_rows(25))
    assert len(read_examples(spec(tiny_data)).train) == 25 and len(rows_read) == 24 + 25


@pytest.mark.parametrize("change", [{"weight": 2.0}, {"eval": {"split": 0.5}}, {"eval": {"split": 0.25, "seed": 1}}])
def test_another_split_or_weight_is_another_entry(tiny_data, change):
    first = read_examples(spec(tiny_data, eval={"split": 0.25}))
    other = read_examples(spec(tiny_data, **{"eval": {"split": 0.25}, **change}))
    assert other.digest != first.digest and len(entries("examples")) == 2


def test_another_version_of_the_code_reads_anew(tiny_data, rows_read, monkeypatch):
    read_examples(spec(tiny_data))
    monkeypatch.setattr(examples, "code_digest", lambda: "other")
    read_examples(spec(tiny_data))
    assert len(rows_read) == 48


def test_files_that_a_mapping_joins_count_as_well(tmp_path):
    answers = tmp_path / "possible_answer"
    answers.mkdir()
    question = {"id": "1", "question": [[{"content": "?"}]], "function": [{"name": "f", "parameters": {}}]}
    path = write_jsonl(tmp_path / "q.json", [question])
    for value in (1, 2):
        write_jsonl(answers / "q.json", [{"id": "1", "ground_truth": [{"f": {"a": [value]}}]}])
        source = {"source": str(path), "mapping": "bfcl"}
        (one,) = read_examples(spec(path, train=[source])).train
        assert one.accepted == {"name": "f", "arguments": {"a": [value]}}


def test_a_mapping_that_hides_what_it_reads_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Bfcl, "reads", lambda self, files: files)
    path = write_jsonl(tmp_path / "q.json", [{}])
    with pytest.raises(AssertionError, match="leaves out"):
        list(open_source(str(path), Bfcl()).rows)


def test_a_file_that_cannot_be_read_is_named(tiny_data, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources, "sha256_file", refused)
    with pytest.raises(DataError, match="cannot be read: Permission denied") as caught:
        read_examples(spec(tiny_data))
    assert caught.value.where == str(tiny_data)


def test_a_start_that_is_killed_while_it_reads_leaves_nothing_that_is_used(tiny_data, monkeypatch):
    add, added = PoolMaker.add, []

    def killed(self, row, example):
        added.append(row)
        if len(added) == 10:
            raise KeyboardInterrupt
        add(self, row, example)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PoolMaker, "add", killed)
        read_examples(spec(tiny_data))
    assert entries("examples") == []
    assert len(read_examples(spec(tiny_data)).train) == 24


def test_a_malformed_row_leaves_nothing_behind(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [*tiny_rows(), {"prompt": "a"}])
    with pytest.raises(DataError):
        read_examples(spec(path))
    assert entries("examples") == []


def test_an_entry_that_is_not_whole_is_made_again(tiny_data, rows_read):
    whole = list(read_examples(spec(tiny_data)).train)
    (name,) = entries("examples")
    path = cache_root() / "examples" / name / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    assert list(read_examples(spec(tiny_data)).train) == whole and len(rows_read) == 48


def test_a_cache_that_cannot_be_written_is_named(tiny_data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMRAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(CapacityError, match="cannot be kept"):
        read_examples(spec(tiny_data))


def test_columns_that_json_does_not_know_are_kept_as_text(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "day": datetime.date(2024, 2, 1)}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    (one,) = read_examples(spec(tmp_path / "x.parquet")).train
    assert one.columns["day"] == "2024-02-01"


def test_half_of_a_character_in_a_column_is_kept(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "more": "\\ud83d"}\n', encoding="utf-8")
    (one,) = read_examples(spec(path, eval=None)).train
    assert one.columns["more"] == "\ud83d"


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.5])
def test_tokens_of_examples_that_repeat_are_there_once(tmp_path, weight):
    rows = [*tiny_rows(9), {"prompt": "q" * 99, "completion": "long"}, {"text": "a document " * 20}]
    path = write_jsonl(tmp_path / "x.jsonl", rows[:-1])
    document = write_jsonl(tmp_path / "y.jsonl", rows[-1:])
    train = [{"source": str(path), "weight": weight}, {"source": str(document), "weight": 2.0}]
    found = read_examples(spec(path, train=train)).train
    data, slow = (
        tokenise_cached(tiny_tokenizer(), found, RULES),
        tokenise_all(tiny_tokenizer(), list(found), max_length=60, over_long="drop"),
    )
    assert list(data.examples) == list(slow.examples) and data.num_dropped == slow.num_dropped
    assert [one.where for one in data.examples] == [one.where for one in slow.examples]
    assert data.examples.lengths.tolist() == [len(one) for one in slow.examples]
    assert data.examples.supervised.tolist() == [one.num_supervised for one in slow.examples]
    kept = {(one.where, one.input_ids.tobytes()) for one in slow.examples}
    assert sum(map(len, data.examples.parts)) == len(kept)


def generated(count: int, words: int):
    """A source of `count` rows, none of which is kept by anyone but who reads it."""
    rows = (
        Row(f"made:{number}", {"prompt": f"{number} " + "x " * words, "completion": "y " * words})
        for number in range(1, count + 1)
    )
    return OpenSource(rows, Columns(), (count, words))


def peak_bytes(count: int, monkeypatch) -> int:
    """The most that Python and numpy held at once from the rows to packed rows of tokens."""
    monkeypatch.setattr(examples, "open_source", lambda source, mapping: generated(count, 250))
    tracemalloc.start()
    try:
        found = read_examples(spec("made", weight=1.5, eval={"split": 0.1}))
        train, held = (tokenise_cached(tiny_tokenizer(), part, Rules(2000)) for part in (found.train, found.eval))
        rows = [pack(part.examples, max_length=2000) for part in (train, held)]
        assert sum(map(len, (train.examples, held.examples))) == count // 10 + round(count * 0.9 * 1.5)
        assert sum(int(one.supervised.sum()) for one in rows) > count * 500
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_data(monkeypatch):
    monkeypatch.setattr("lmray.data.tokenise.CHUNK", 20)
    monkeypatch.setattr(cache, "PART_TOKENS", 20_000)
    peak_bytes(1000, monkeypatch)  # what is made once, some of it with the first rows of a second call
    peak_bytes(200, monkeypatch)
    few, many = (peak_bytes(count, monkeypatch) for count in (200, 1000))
    text = 800 * 1000  # bytes that there are more of; the tokens are eight times as many
    assert many - few < text * 0.3


def test_a_pool_holds_what_came_in_the_order_it_came(tmp_path):
    with PoolMaker(tmp_path) as maker:
        for mapping, column in ((Columns(), "a"), (Columns(completion="prompt"), "b")):
            maker.begin(mapping)
            row = Row(f"{column}:1", {"prompt": column, "completion": "赤"})
            maker.add(row, mapping.example(row))
        facts = maker.facts()
    pool = Pool(tmp_path, facts)
    assert [pool[index].answer for index in range(2)] == ["赤", "b"]
    assert [pool[index].where for index in range(2)] == ["a:1", "b:1"]
