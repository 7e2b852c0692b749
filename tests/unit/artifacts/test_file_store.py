"""The four verbs of the storage port on a file system."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmray.artifacts.file_store import FileStore
from lmray.artifacts.files import temporary_beside
from lmray.artifacts.store import open_store
from lmray.config.places import cache_root, store_root
from lmray.errors import ConfigError


@pytest.fixture
def store(tmp_path) -> FileStore:
    return FileStore(tmp_path / "store")


def test_get_gives_what_was_put_and_none_where_nothing_was(store, tmp_path):
    assert store.get("a/b") is None
    store.put("a/b", b"bytes")
    store.put("a/b", b"others")
    (tmp_path / "file").write_bytes(b"content")
    store.put("a/c", tmp_path / "file")
    assert (store.get("a/b"), store.get("a/c")) == (b"others", b"content")


def test_list_gives_keys_below_a_folder_without_locks_and_temporary_files(store):
    for key in ("log/2", "log/1", "log/deep/3", "logs/4"):
        store.put(key, b"")
    store.compare_and_swap("log/5", None, b"")
    (store.root / "log" / ".1.123.tmp").write_bytes(b"")
    assert store.list("log") == ["log/1", "log/2", "log/5", "log/deep/3"]
    assert store.list("nowhere") == []


def test_compare_and_swap_writes_only_over_what_was_expected(store):
    assert store.compare_and_swap("a", None, b"1")
    assert not store.compare_and_swap("a", None, b"2")
    assert not store.compare_and_swap("a", b"0", b"2")
    assert store.get("a") == b"1"
    assert store.compare_and_swap("a", b"1", b"2")
    assert store.get("a") == b"2"


def test_many_threads_that_count_with_compare_and_swap_lose_nothing(store):
    def add(_):
        while True:
            before = store.get("count")
            if store.compare_and_swap("count", before, str(int(before or b"0") + 1).encode()):
                return

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(64)))
    assert store.get("count") == b"64"


def test_a_put_that_fails_leaves_the_old_content_and_no_temporary_file(store, tmp_path):
    store.put("a", b"old")
    with pytest.raises(FileNotFoundError):
        store.put("a", tmp_path / "missing")
    assert store.get("a") == b"old"
    assert [path.name for path in store.root.iterdir()] == ["a"]


def test_the_store_is_the_folder_given_or_the_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("LMRAY_STORE", str(tmp_path / "mine"))
    assert open_store().root == tmp_path / "mine"
    assert open_store(str(tmp_path / "given")).root == tmp_path / "given"
    monkeypatch.delenv("LMRAY_STORE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store().root == tmp_path / ".lmray" / "store"
    assert open_store("~/here").root == tmp_path / "here"


def test_a_url_is_refused_while_no_store_speaks_it():
    with pytest.raises(ConfigError, match="allowed: a folder that every node sees"):
        open_store("s3://bucket/key")


def test_places_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LMRAY_STORE", "LMRAY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert store_root() == tmp_path / ".lmray" / "store"
    assert cache_root() == tmp_path / ".cache" / "lmray"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "lmray"
    monkeypatch.setenv("LMRAY_CACHE", "~/mine")
    assert cache_root() == tmp_path / "mine"


WRITE_MANY = """
import sys
from pathlib import Path
from lmray.artifacts.file_store import FileStore
store = FileStore(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    while True:
        before = store.get("log")
        if store.compare_and_swap("log", before, (before or b"") + f"{sys.argv[2]}-{number} ".encode()):
            break
"""
DIE_LOCKED = """
import os, signal, sys
from pathlib import Path
from lmray.artifacts.file_store import FileStore
if sys.argv[2] == "before":
    FileStore.put = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
else:
    os.replace = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
FileStore(Path(sys.argv[1])).compare_and_swap("log", b"first", b"never")
"""


def test_processes_that_add_to_one_key_at_once_lose_nothing(store):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE_MANY, str(store.root), name, "20"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "abc"
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.communicate("go\n")
        assert writer.returncode == 0
    entries = (store.get("log") or b"").decode().split()
    assert sorted(entries) == sorted(f"{name}-{number}" for name in "abc" for number in range(20))
    assert [entry for entry in entries if entry.startswith("b")] == [f"b-{number}" for number in range(20)]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_writer_killed_with_the_lock_blocks_nobody_and_writes_nothing(store, moment):
    store.put("log", b"first")
    done = subprocess.run([sys.executable, "-c", DIE_LOCKED, str(store.root), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert store.compare_and_swap("log", b"first", b"second")
    assert store.get("log") == b"second"
    assert not list(store.root.glob(".*.tmp")), "what the killed writer left is gone"


def test_temporary_files_of_others_are_left_alone_until_nobody_can_own_them(store):
    store.put("a", b"")
    mine = temporary_beside(store.root / "b")
    elsewhere, forgotten = store.root / ".b.othernode-1-00000000.tmp", store.root / ".c.othernode-1-00000000.tmp"
    for path in (mine, elsewhere, forgotten):
        path.write_bytes(b"half")
    os.utime(forgotten, (0, 0))
    store.put("a", b"")
    assert mine.exists() and elsewhere.exists() and not forgotten.exists()


def test_stamps_tell_what_was_written_again_and_folders_what_lies_below(store):
    assert store.stamp("a/b/one") is None and store.folders("a") == []
    store.put("a/b/one", b"1")
    store.put("a/c/two", b"2")
    before = store.stamp("a/b/one")
    assert store.stamp("a/b/one") == before and store.stamp("a/c/two") != before
    store.put("a/b/one", b"3")
    assert store.stamp("a/b/one") != before
    assert store.folders("a") == ["b", "c"]
