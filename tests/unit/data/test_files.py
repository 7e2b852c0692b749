import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmray.data.base import Row
from lmray.data.files import read_rows
from lmray.errors import DataError

ROWS = [{"prompt": "赤は?", "completion": "red"}, {"prompt": "b", "completion": "c"}]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """`rows` in the format that the suffix of `path` says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("suffix", "first"), [(".jsonl", 1), (".json", 1), (".parquet", 1), (".csv", 2), (".tsv", 2), (".JSONL", 1)]
)
def test_every_format_gives_the_same_rows(tmp_path, suffix, first):
    path = write_rows(tmp_path / f"行{suffix}", ROWS)
    rows = list(read_rows(path))
    assert [row.value for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{path}:{first}", f"{path}:{first + 1}"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, text in {"x.jsonl": '{"a": "b"}', "x.json": '[{"a": "b"}]', "x.csv": "a\nb\n"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert [row.value for row in read_rows(tmp_path / name)] == [{"a": "b"}]


def test_line_separators_inside_a_string_end_no_line(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"a": "one\u2028two\x85three"}, {"a": "four"}])
    assert [row.value["a"] for row in read_rows(path)] == ["one\u2028two\x85three", "four"]


def test_cells_of_csv_hold_commas_quotes_lines_and_whole_documents(tmp_path):
    rows = [{"a": 'say "hi", or\nnot', "b": "x" * 200_000}, {"a": "", "b": "後"}]
    read = list(read_rows(write_rows(tmp_path / "x.csv", rows)))
    assert [row.value for row in read] == rows
    assert [row.where for row in read] == [f"{tmp_path / 'x.csv'}:2", f"{tmp_path / 'x.csv'}:4"]


def test_a_text_file_is_one_row(tmp_path):
    (tmp_path / "x.txt").write_text("一行\n\ntwo\n", encoding="utf-8")
    assert list(read_rows(tmp_path / "x.txt")) == [Row(f"{tmp_path / 'x.txt'}:1", {"text": "一行\n\ntwo\n"})]


def test_a_long_text_is_cut_at_blank_lines(tmp_path):
    paragraph = ("x" * 99 + "\n") * 300 + "\n"
    (tmp_path / "x.txt").write_text(paragraph * 7, encoding="utf-8")
    rows = list(read_rows(tmp_path / "x.txt"))
    assert [row.value["text"] for row in rows] == [paragraph * 3, paragraph * 3, paragraph]
    assert [row.where.rpartition(":")[2] for row in rows] == ["1", "904", "1807"]


def test_a_long_text_without_blank_lines_is_cut_at_lines(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf" + b"0123456\r\n" * 60_000)
    texts = [row.value["text"] for row in read_rows(tmp_path / "x.txt")]
    assert "".join(texts) == "0123456\n" * 60_000
    assert [len(text) % 8 for text in texts] == [0] * 3


@pytest.mark.parametrize(
    ("name", "content"), [("x.jsonl", "\n \n"), ("x.json", "[]"), ("x.csv", "\na,b\n\n"), ("x.txt", ""), ("x.json", "")]
)
def test_files_without_a_row(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert list(read_rows(tmp_path / name)) == []


@pytest.mark.parametrize("indent", [None, 1])
def test_instances_carry_the_type_of_their_file(tmp_path, indent):
    content = {"type": "text_only", "instances": [{"text": "a"}, {"text": "b"}]}
    (tmp_path / "x.json").write_text(json.dumps(content, indent=indent), encoding="utf-8")
    assert [row.value for row in read_rows(tmp_path / "x.json")] == [
        {"text": "a", "type": "text_only"},
        {"text": "b", "type": "text_only"},
    ]


def test_lines_in_a_json_file_are_read_as_lines(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    assert [row.value for row in read_rows(tmp_path / "x.json")] == [{"a": 1}, {"a": 2}]


def test_objects_in_parquet_hold_only_the_keys_that_were_written(tmp_path):
    rows = [{"turns": [{"a": 1}, {"b": {"c": 2}}], "d": None}, {"turns": [{"b": {"e": 3}}], "d": "x"}]
    assert [row.value for row in read_rows(write_rows(tmp_path / "x.parquet", rows))] == rows


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": ', encoding="utf-8")
    rows = read_rows(path)
    assert next(rows).value == {"a": 1}
    with pytest.raises(DataError, match="malformed JSON"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "place", "message"),
    [
        ("x.jsonl", b'{"prompt": 1}\n{"prompt"', ":2", "malformed JSON"),
        ("x.jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ":1", "malformed JSON: maximum recursion"),
        ("x.jsonl", b'"text"', ":1", "a row is a str"),
        ("x.jsonl", b"[1]", ":1", "a row is a int"),
        ("x.jsonl", b'{"a": 1}\n\n{"a": "\xff\xfe"}', ":3", "not UTF-8 at byte 7"),
        ("x.json", b'[{"a": 1},\n{"a": "\xff"}]', ":2", "not UTF-8"),
        ("x.json", b'[{"a": 1},\n{"a": ', ":1", "malformed JSON"),
        ("x.json", b'{"rows": [{"a": 1}],\n "b": 2}', "", "one JSON object with rows, b"),
        ("x.json", b'{"type": "text_only", "instances": 3}', "", "one JSON object"),
        ("x.json", b'{"type": "text_only", "instances": ["a"]}', ":1", "a row is a str"),
        ("x.txt", b"one\ntwo \xff", ":2", "not UTF-8 at byte 4"),
        ("x.csv", b"a,b\n1,2\n3,\xff\n", ":3", "not UTF-8"),
        ("x.csv", b'a,b\n1,"2\n2"\n1,2,3\n', ":4", "has 3 fields, the header 2: a, b"),
        ("x.csv", b"a,b\n1\n", ":2", "has 1 fields, the header 2"),
        ("x.csv", b'a,b\n1,"2\n', ":2", "malformed CSV"),
        ("x.csv", b"a,a\n1,2\n", ":1", "names a column twice: a"),
    ],
)
def test_malformed_files_are_named_with_the_line(tmp_path, name, content, place, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(path))
    assert caught.value.where == f"{path}{place}" and caught.value.exit_code == 2


def test_unknown_suffixes_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="unknown kind of file"):
        list(read_rows(tmp_path / "x.xlsx"))
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(read_rows(tmp_path / "x.jsonl"))


def test_broken_parquet_files_are_refused(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="no readable Parquet"):
        list(read_rows(path))
    whole = write_rows(path, ROWS * 100).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="no readable Parquet") as caught:
        list(read_rows(path))
    assert caught.value.where == str(path)


def test_a_parquet_file_with_a_damaged_middle_says_how_far_it_reads(tmp_path):
    path = tmp_path / "x.parquet"
    rows = [{"a": f"{index} " * 9} for index in range(4000)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1024, use_dictionary=False, compression="gzip")
    place = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 200)
    with pytest.raises(DataError, match="is damaged after row 2048"):
        list(read_rows(path))
