import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmray.artifacts import wheels
from lmray.data.files import find_files, read_rows
from lmray.data.mappings.columns import Columns
from lmray.errors import ArtifactError, DataError

ROWS = [{"prompt": "赤は?", "completion": "red"}, {"prompt": "b", "completion": "c"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"行{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    rows = list(read_rows(path))
    assert [row.value for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:2"]


def test_folders_and_globs_are_read_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.md"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    assert [path.name for path in find_files(str(tmp_path), None)] == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in find_files(str(tmp_path / "*.jsonl"), None)] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("content", "place", "message"),
    [
        (b'{"prompt": 1}\n{"prompt"', ":2", "malformed JSON"),
        (b'"text"', ":1", "a row is a str"),
        (b"[1]", ":1", "a row is a int"),
        (b"\xff\xfe", "", "not UTF-8"),
    ],
)
def test_malformed_files_are_named_with_the_line(tmp_path, content, place, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(path))
    assert caught.value.where == f"{path}{place}" and caught.value.exit_code == 2


def test_a_broken_parquet_file_and_an_unknown_suffix_are_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="no readable Parquet"):
        list(read_rows(tmp_path / "x.parquet"))
    with pytest.raises(DataError, match="unknown kind of file"):
        list(read_rows(tmp_path / "x.xlsx"))


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        find_files(str(tmp_path / "nope.jsonl"), None)
    with pytest.raises(DataError, match="holds no data files"):
        find_files(str(tmp_path), None)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    folder = tmp_path / "wheel"
    (folder / "package" / "data").mkdir(parents=True)
    (folder / "package" / "data" / "rows.jsonl").write_text("{}", encoding="utf-8")
    (tmp_path / "outside.jsonl").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("lmray.data.files.wheel_folder", lambda package: folder)


def test_a_file_in_a_wheel(wheel):
    (found,) = find_files("pypi:some-package/package/data/rows.jsonl", None)
    assert found.name == "rows.jsonl"


@pytest.mark.parametrize("member", ["package/nope.jsonl", "../outside.jsonl"])
def test_a_wheel_without_that_file_lists_what_it_has(wheel, member):
    with pytest.raises(DataError, match="no such file") as caught:
        find_files(f"pypi:some-package/{member}", None)
    assert "package/data/rows.jsonl" in str(caught.value)


def test_a_wheel_needs_a_path_or_a_mapping_that_knows_it(wheel):
    with pytest.raises(DataError, match="names no file in the wheel"):
        find_files("pypi:some-package", Columns())


def test_a_wheel_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(DataError, match="could not be downloaded"):
        find_files("pypi:surely-no-such-package==9.9/x.jsonl", None)
    assert not list((tmp_path / "cache" / "wheels").glob("surely*"))


def test_a_wheel_name_is_no_path():
    with pytest.raises(ArtifactError, match="no package name"):
        wheels.wheel_folder("../etc")
