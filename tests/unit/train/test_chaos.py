"""A kill before any file operation of a run loses nothing and leaves nothing behind."""

from __future__ import annotations

import pytest

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store, run_folder
from lmray.metrics.events import read_events
from lmray.testing.jobs import curve, run_here, tiny_job, tiny_rows, write_jsonl
from lmray.testing.kills import Killed, file_operations

CHANGES = {"train__max_steps": 3, "train__save_steps": 1, "output": {"artifact": "kept"}, "evaluate": {"tasks": []}}
MAX_KILLS = 26


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("chaos")
    data = write_jsonl(root / "data.jsonl", tiny_rows(12))

    def make(name: str, *, beside: bool):
        job = tiny_job(tiny_model, data, root / name / "store", **CHANGES, resources={"async_checkpoints": beside})
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


@pytest.mark.parametrize("beside", [False, True], ids=["between steps", "beside steps"])
def test_a_kill_at_any_write_loses_nothing_and_leaves_nothing(place, beside):
    root, make = place
    root = root / str(beside)
    whole, run = make(f"{beside}/whole", beside=beside)
    seen = file_operations(root / "whole", run)
    expected = sorted(path.relative_to(root / "whole").as_posix() for path in (root / "whole").rglob("*"))
    kills = one_of_each(seen)
    assert len(kills) == MAX_KILLS, "few operations were heard: the test says little"
    for kill in kills:
        job, run = make(f"{beside}/kill{kill}", beside=beside)
        with pytest.raises(Killed):
            file_operations(root / f"kill{kill}", run, kill_at=kill)
        what = f"killed at {seen[kill - 1]}"
        assert run().status in ("succeeded", "already-done"), what
        folder = run_folder(job)
        assert curve(job) == pytest.approx(curve(whole), abs=1e-6), what
        assert [event["step"] for event in read_events(folder / "events.jsonl")] == [1, 2, 3], what
        left = sorted(path.relative_to(root / f"kill{kill}").as_posix() for path in (root / f"kill{kill}").rglob("*"))
        assert left == expected, what
        assert len(Artifacts(open_store(job.storage)).versions("kept")) == 1, what
