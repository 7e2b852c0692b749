"""`python:MODULE`: texts of the standard library, read without running anything."""

import pydoc_data.topics
import sysconfig

import pytest

from lmray.config import Document, decode
from lmray.data.examples import read_examples
from lmray.data.sources import open_source
from lmray.data.spec import DataSpec
from lmray.errors import DataError


def values(source: str) -> list[dict]:
    return [row.value for row in open_source(source, None).rows]


def test_the_topics_of_the_language_reference_are_documents():
    rows = list(open_source("python:pydoc_data.topics", None).rows)
    assert {row.value["name"]: row.value["text"] for row in rows} == pydoc_data.topics.topics
    assert rows[0].where == "python:pydoc_data.topics:1"
    spec = decode(DataSpec, Document("job", {"train": [{"source": "python:pydoc_data.topics"}]}))
    read = read_examples(spec)
    assert [example.text for example in read.train] == [*pydoc_data.topics.topics.values()]
    assert read.formats == (f"python:pydoc_data.topics: text; {len(rows)} rows, {len(rows)} an epoch",)


@pytest.mark.parametrize("name", ["numpy", "lmray.job", "../os", "", "os; import sys", "site-packages.numpy"])
def test_only_the_standard_library_is_read(name):
    with pytest.raises(DataError, match="is no module of the standard library"):
        values(f"python:{name}")


def test_a_misspelt_module_is_guessed():
    with pytest.raises(DataError, match="did you mean `pydoc_data`"):
        values("python:pydoc_dta.topics")


@pytest.mark.parametrize("name", ["sys", "pydoc_data.nope"])
def test_a_module_without_source_is_told(name):
    with pytest.raises(DataError, match="has no source"):
        values(f"python:{name}")


def test_a_package_is_read_by_its_first_file():
    with pytest.raises(DataError, match="no mapping of names to texts"):
        values("python:json")


def test_a_module_without_texts_is_told():
    with pytest.raises(DataError, match="no mapping of names to texts"):
        values("python:this")


def test_nothing_of_the_module_runs(tmp_path, monkeypatch):
    """What is written out literally counts; a call beside it is passed over, not made."""
    lines = [
        'raise SystemExit("ran")',
        'a = {"one": "色は"}',
        'b: dict = {"two": "匂へど"}',
        'c = {"three": print("ran")}',
    ]
    (tmp_path / "this.py").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert values("python:this") == [
        {"name": "one", "text": "色は"},
        {"name": "two", "text": "匂へど"},
    ]
