"""Rows out of files, one at a time: JSON lines, JSON arrays, LMFlow's JSON, CSV, Parquet, plain text.

An array and LMFlow's object are in memory as a whole while they are read; of the others, a row or a batch of them is.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lmray.data.base import Row
from lmray.errors import DataError

TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXTS = (".txt", ".text", ".md")
SUFFIXES = (*TABLES, *TEXTS)
PIECE = 65_536
"""Characters of a text after which the next blank line ends the row; where there is none, a line does after four
times as many."""
_BLANK = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"


def read_rows(path: Path, shown: str | None = None) -> Iterator[Row]:
    """Every record of `path` with its place: `file:line` for JSON lines, text and CSV (whose header is line 1),
    else `file:row`.

    `shown` stands for the path in messages. A text file is one row with the column `text`; a longer one than PIECE is
    cut at blank lines, so that a corpus in one file can be split and is never in memory as a whole. Raises DataError.
    """
    name = shown or str(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(name, f"unknown kind of file `{path.suffix}`", allowed=" ".join(SUFFIXES))
    try:
        yield from read(path, name)
    except OSError as error:
        raise DataError(name, f"cannot be read: {error.strerror or error}") from None


def _json_rows(path: Path, name: str) -> Iterator[Row]:
    with open(path, "rb") as file:
        start, first = _first_line(file)
        if first.startswith(b"["):
            text = _decoded(file.read(), name)
            yield from (_row(f"{name}:{number}", value) for number, value in enumerate(_json(text, f"{name}:1"), 1))
            return
        if path.suffix.lower() == ".json" and first.startswith(b"{"):
            whole = _whole_object(file, first, name)
            if whole is not None:
                yield from _instances(whole, name)
                return
        file.seek(start)
        for number, line in enumerate(file, start=1):
            where = f"{name}:{number}"
            if line.strip(_BLANK):
                yield _row(where, _json(_utf8(line, where), where))


def _first_line(file: BinaryIO) -> tuple[int, bytes]:
    """Where the text of `file` begins, after a byte order mark, and its first line that is not blank; `file` is left
    at the beginning of the text."""
    start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(start)
    first = next((line.strip(_BLANK) for line in file if line.strip(_BLANK)), b"")
    file.seek(start)
    return start, first


def _whole_object(file: BinaryIO, first: bytes, name: str) -> dict[str, Any] | None:
    """The one object that a `.json` file holds; None where the first line is an object by itself: then it holds
    lines."""
    try:
        value = json.loads(first)
    except ValueError:
        return _json(_decoded(file.read(), name), f"{name}:1")
    return value if "instances" in value else None


def _instances(value: dict[str, Any], name: str) -> Iterator[Row]:
    """The instances of LMFlow's `{type, instances}`, each with the type."""
    instances = value.get("instances")
    if not isinstance(instances, list) or "type" not in value:
        found = f"is one JSON object with {', '.join(value) or 'nothing in it'}"
        hint = "write the rows as an array, or one object a line"
        raise DataError(name, found, allowed="an array, JSON lines, or {type, instances}", hint=hint)
    for number, instance in enumerate(instances, start=1):
        row = _row(f"{name}:{number}", instance)
        yield Row(row.where, {**row.value, "type": value["type"]})


def _csv_rows(path: Path, name: str, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is shorter than a document
    with open(path, "rb") as file:
        start, _ = _first_line(file)
        file.seek(start)
        reader = csv.reader(_lines(file, name), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        line = 1
        while (record := _next_record(reader, f"{name}:{line}")) is not None:
            where, line = f"{name}:{line}", reader.line_num + 1
            if not record:  # a blank line
                continue
            if header is None:
                header = _header(record, where)
            else:
                yield Row(where, _cells(header, record, where))


def _lines(file: BinaryIO, name: str) -> Iterator[str]:
    return (_utf8(line, f"{name}:{number}") for number, line in enumerate(file, start=1))


def _next_record(reader: Any, where: str) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        hint = 'a cell with a comma, a quote or a line break stands in quotes, a quote in it is doubled: "say ""hi"""'
        raise DataError(where, f"malformed CSV: {error}", hint=hint) from None


def _header(record: list[str], where: str) -> list[str]:
    twice = sorted({column for column in record if record.count(column) > 1})
    if twice:
        raise DataError(where, f"the header names a column twice: {', '.join(twice)}")
    return record


def _cells(header: list[str], record: list[str], where: str) -> dict[str, str]:
    if len(record) != len(header):
        hint = (
            "put cells that hold a comma in quotes" if len(record) > len(header) else "see whether a quote is missing"
        )
        found = f"has {len(record)} fields, the header {len(header)}: {', '.join(header)}"
        raise DataError(where, found, hint=hint)
    return dict(zip(header, record, strict=True))


def _tsv_rows(path: Path, name: str) -> Iterator[Row]:
    return _csv_rows(path, name, "\t")


def _text_rows(path: Path, name: str) -> Iterator[Row]:
    piece: list[str] = []
    size, begin = 0, 1
    with open(path, "rb") as file:
        file.seek(_first_line(file)[0])
        for number, line in enumerate(_lines(file, name), start=1):
            piece.append(line.removesuffix("\r\n") + "\n" if line.endswith("\r\n") else line)
            size += len(line)
            if size >= PIECE and (not line.strip() or size >= 4 * PIECE):
                yield Row(f"{name}:{begin}", {"text": "".join(piece)})
                piece, size, begin = [], 0, number + 1
    if piece:
        yield Row(f"{name}:{begin}", {"text": "".join(piece)})


def _parquet_rows(path: Path, name: str) -> Iterator[Row]:
    number = 0
    try:
        file = pq.ParquetFile(path)
        nested = any(pa.types.is_nested(field.type) for field in file.schema_arrow)
        for batch in file.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{name}:{number}", without_gaps(value) if nested else value)
    except (pa.ArrowException, OSError) as error:
        found = f"is no readable Parquet file: {error}" if number == 0 else f"is damaged after row {number}: {error}"
        raise DataError(name, found, hint="write the file again; it may have been cut off while copied") from None


def without_gaps(value: dict[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table whose nested objects lose the keys that hold nothing: Arrow gives every object in a
    column the keys of all others."""
    return {column: _filled(inner) for column, inner in value.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, list):
        return [_filled(item) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return value


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}", f"is not UTF-8 at byte {error.start}", hint="save it as UTF-8") from None


def _utf8(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(where, f"is not UTF-8 at byte {error.start} of the line", hint="save it as UTF-8") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "each line of a .jsonl file is one JSON object; a .json file may be one array"
        raise DataError(where, f"malformed JSON: {error}", hint=hint) from None


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(where, f"a row is a {type(value).__name__}", allowed="a JSON object with columns")
    return Row(where, value)


_READERS = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".parquet": _parquet_rows,
    **dict.fromkeys(TEXTS, _text_rows),
}
