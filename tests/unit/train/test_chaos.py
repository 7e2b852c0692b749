"""A kill before any file operation of a run loses nothing and leaves nothing behind.

Python's audit events tell of every file that is opened to write, renamed or removed, whoever does it. At the chosen one
the process "dies": that operation and all later ones fail, so nothing that cleans up on the way out can help.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from lmray.artifacts import files
from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store, run_folder
from lmray.metrics.events import read_events
from lmray.testing.jobs import curve, run_here, tiny_job, tiny_rows, write_jsonl

CHANGES = {"train__max_steps": 3, "train__save_steps": 1, "output": {"artifact": "kept"}, "evaluate": {"tasks": []}}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MAX_KILLS = 26
DEAD_PID = 2**22 + 1
"""Above the largest number a process can have."""


class Killed(BaseException):
    """What a kill is to the code that is running."""


class Reaper:
    """Counts file operations below `root` and kills at the one it is told."""

    def __init__(self):
        self.root, self.at, self.seen = "", 0, []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if not self.root or not self._changes(event, arguments):
            return
        path = next((str(one) for one in arguments if str(one).startswith(self.root)), None)
        if path is None:
            return
        self.seen.append((event, re.sub(r"-[0-9a-f]{8}\.tmp|[0-9a-f]{16,}|\d+", "N", path.removeprefix(self.root))))
        if self.at and len(self.seen) >= self.at:
            raise Killed(event, path)

    @staticmethod
    def _changes(event: str, arguments: tuple) -> bool:
        if event == "open":
            return isinstance(arguments[2], int) and bool(arguments[2] & WRITES)
        return event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link")

    def watch(self, root: Path, run, *, at: int = 0) -> list[tuple[str, str]]:
        """What `run` does below `root`; it is killed at operation `at`, counted from one."""
        self.root, self.at, self.seen = str(root), at, []
        try:
            run()
        finally:
            self.root = ""
        return self.seen


REAPER = Reaper()


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("chaos")
    data = write_jsonl(root / "data.jsonl", tiny_rows(12))

    def make(name: str):
        job = tiny_job(tiny_model, data, root / name / "store", **CHANGES)
        return job, lambda: run_here(job, root / name / "scratch")

    return root, make


def one_of_each(seen: list[tuple[str, str]]) -> list[int]:
    """Numbers of the first and the last of each kind of operation, thinned evenly to MAX_KILLS."""
    first = {kind: number for number, kind in reversed(list(enumerate(seen, 1)))}
    last = {kind: number for number, kind in enumerate(seen, 1)}
    chosen = sorted({*first.values(), *last.values()})
    return (
        [chosen[index * len(chosen) // MAX_KILLS] for index in range(MAX_KILLS)] if len(chosen) > MAX_KILLS else chosen
    )


def test_a_kill_at_any_write_loses_nothing_and_leaves_nothing(place, monkeypatch):
    root, make = place
    whole, run = make("whole")
    seen = REAPER.watch(root / "whole", run)
    expected = sorted(path.relative_to(root / "whole").as_posix() for path in (root / "whole").rglob("*"))
    kills = one_of_each(seen)
    assert len(kills) == MAX_KILLS, "few operations were heard: the test says little"
    for kill in kills:
        job, run = make(f"kill{kill}")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(files, "_writer", lambda: f"{files.platform.node()}-{DEAD_PID}")
            REAPER.watch(root / f"kill{kill}", run, at=kill)
        what = f"killed at {seen[kill - 1]}"
        assert run().status in ("succeeded", "already-done"), what
        folder = run_folder(job)
        assert curve(job) == pytest.approx(curve(whole), abs=1e-6), what
        assert [event["step"] for event in read_events(folder / "events.jsonl")] == [1, 2, 3], what
        left = sorted(path.relative_to(root / f"kill{kill}").as_posix() for path in (root / f"kill{kill}").rglob("*"))
        assert left == expected, what
        assert len(Artifacts(open_store(job.storage)).versions("kept")) == 1, what
