"""A reader sees the old content or the new, whatever happens to the writer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from lmray.artifacts import files
from lmray.artifacts.files import (
    check_writable,
    folder_digests,
    only_writer,
    read_sealed,
    replace_folder,
    seal,
    sha256_file,
    sha256_json,
    write_atomic,
    write_json,
)
from lmray.errors import ArtifactError, CapacityError

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writing_makes_folders_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"bytes")
    write_atomic(path, "日本語")
    assert path.read_text(encoding="utf-8") == "日本語"
    write_json(path, {"キー": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"キー": 1}
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_writer_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_writer_killed_while_writing_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    code = (
        "import os, signal, sys; from pathlib import Path; from lmray.artifacts.files import write_atomic\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"  # all is written, nothing renamed
        "write_atomic(Path(sys.argv[1]), b'new' * 100000)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_atomic(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_a_folder_is_replaced_whole(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_bytes(b"new")
    replace_folder(source, target)
    (target / "stale").write_bytes(b"")
    replace_folder(source, target)
    assert [path.relative_to(target).as_posix() for path in target.rglob("*")] == ["deep", "deep/file"]
    assert names(tmp_path) == ["source", "target"]


def test_a_folder_that_cannot_be_copied_leaves_the_old_one(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (target / "old").write_bytes(b"")

    def fail(source, target):
        os.mkdir(target)
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copytree", fail)
    with pytest.raises(OSError, match="disk full"):
        files.replace_folder(source, target)
    assert names(target) == ["old"]
    assert names(tmp_path) == ["source", "target"]


def test_digests_are_of_content_not_of_order(tmp_path):
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "manifest.json").write_bytes(b"{}")
    assert sha256_file(tmp_path / "b") == EMPTY
    assert list(folder_digests(tmp_path)) == ["a", "b"]
    assert folder_digests(tmp_path)["b"] == {"sha256": EMPTY, "bytes": 0}
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json({"b": [2], "a": 1}) != sha256_json({"a": 1, "b": [3]})


@pytest.mark.parametrize("change", ["flip", "cut", "remove"])
def test_a_sealed_folder_tells_which_file_changed(tmp_path, change):
    (tmp_path / "weights").write_bytes(b"weights")
    (tmp_path / "state").write_bytes(b"state")
    seal(tmp_path, step=7)
    assert read_sealed(tmp_path)["step"] == 7
    path = tmp_path / "weights"
    path.unlink() if change == "remove" else path.write_bytes({"flip": b"wEights", "cut": b"weig"}[change])
    with pytest.raises(ArtifactError, match=r"weights: is missing or not what its manifest says"):
        read_sealed(tmp_path)


@pytest.mark.parametrize("manifest", ["", "{", '{"files"', "{}", "[]", '{"files": 3}'])
def test_a_folder_without_a_readable_manifest_was_not_finished(tmp_path, manifest):
    with pytest.raises(ArtifactError, match="has no manifest"):
        read_sealed(tmp_path)
    (tmp_path / "manifest.json").write_text(manifest, encoding="utf-8")
    with pytest.raises(ArtifactError, match="no readable manifest"):
        read_sealed(tmp_path)


def test_a_second_writer_is_refused_while_the_first_is_there(tmp_path):
    held, refused = only_writer(tmp_path / "run"), pytest.raises(CapacityError, match="another process is running")
    with held, refused, only_writer(tmp_path / "run"):
        pass
    with only_writer(tmp_path / "run"):
        pass


def test_a_killed_writers_lock_is_gone(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib; from lmray.artifacts.files import only_writer\n"
            "with only_writer(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()",
            str(tmp_path / "run"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(CapacityError, match="name"), only_writer(tmp_path / "run"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with only_writer(tmp_path / "run"):
        pass


def test_a_place_that_can_be_written_to_is_checked_without_writing(tmp_path):
    check_writable(tmp_path / "not" / "there" / "yet")
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CapacityError, match="file: is a file"):
        check_writable(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere but on a read-only mount
    with pytest.raises(CapacityError, match="cannot be written to") as caught:
        check_writable(tmp_path / "store" / "run")
    assert caught.value.where == str(tmp_path) and caught.value.exit_code == 2


def test_locks_of_different_names_do_not_meet(tmp_path):
    with only_writer(tmp_path, lock_name=".writer.lock"), only_writer(tmp_path):
        pass
