"""Shards on disk: whole or not there, whatever moment a kill comes at."""

from __future__ import annotations

import shutil

import pytest

from lmray.generate.shards import ShardRecord, Shards, busy_seconds
from lmray.testing.kills import Killed, file_operations


def row(index: int, error: str | None = None) -> dict:
    choices = [] if error else [{"index": 0, "text": f"答え{index}", "finish_reason": "stop"}]
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    return {"index": index, "id": None, "adapter": None, "choices": choices, "usage": usage, "error": error}


def shards(root, num_rows: int = 10) -> Shards:
    return Shards(root / "run", root / "answers", num_rows=num_rows, size=4, suffixes=("jsonl", "parquet"))


def answer(one: Shards, index: int) -> ShardRecord:
    one.begin(index, max_failures=0)
    return one.write(index, [row(place) for place in one.rows(index)], began=1.0, ended=2.0)


def content(root) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "answers").iterdir())}


def test_rows_are_cut_in_order(tmp_path):
    one = shards(tmp_path)
    assert [one.rows(index) for index in range(len(one))] == [range(4), range(4, 8), range(8, 10)]
    assert len(shards(tmp_path, num_rows=8)) == 2


def test_a_kill_at_any_file_operation_leaves_a_shard_whole_or_undone(tmp_path):
    def run(root) -> None:
        one = shards(root)
        one.tidy()
        for index in range(len(one)):
            if index not in one.done():
                answer(one, index)

    run(tmp_path / "whole")
    operations = file_operations(tmp_path / "count", lambda: run(tmp_path / "count"))
    assert len(operations) > 20
    for at in range(1, len(operations) + 1):
        root = tmp_path / "cut"
        with pytest.raises(Killed):
            file_operations(root, lambda root=root: run(root), kill_at=at)
        run(root)
        assert content(root) == content(tmp_path / "whole"), operations[at - 1]
        assert len(shards(root).done()) == 3
        shutil.rmtree(root)


def test_a_record_counts_and_is_read_again(tmp_path):
    one = shards(tmp_path, num_rows=2)
    one.tidy()
    record = one.write(0, [row(0), row(1, "the prompt is empty")], began=5.0, ended=7.5)
    assert (record.rows, record.errors, record.prompt_tokens, record.completion_tokens) == (2, 1, 6, 4)
    assert one.done() == {0: record} and set(record.files) == {"part-000000.jsonl", "part-000000.parquet"}


@pytest.mark.parametrize("spoil", ["file", "gone", "record", "other"])
def test_what_is_not_what_its_record_says_is_not_done(tmp_path, spoil):
    one = shards(tmp_path)
    one.tidy()
    answer(one, 0)
    answer(one, 1)
    file, record = tmp_path / "answers" / "part-000001.parquet", tmp_path / "run" / "shards" / "000001.json"
    if spoil == "file":
        file.write_bytes(b"x" * file.stat().st_size)
    elif spoil == "gone":
        file.unlink()
    elif spoil == "record":
        record.write_text("{", encoding="utf-8")
    else:
        shutil.copy(tmp_path / "run" / "shards" / "000000.json", record)
    assert [*one.done()] == [0]


def test_seconds_that_shards_share_count_once():
    def record(began: float, ended: float) -> ShardRecord:
        return ShardRecord(0, 1, 0, 1, 1, began, ended, {})

    spans = [record(0, 4), record(1, 2), record(3, 6), record(10, 11)]
    assert busy_seconds(spans) == busy_seconds(spans[::-1]) == 7.0
    assert busy_seconds([]) == 0.0
