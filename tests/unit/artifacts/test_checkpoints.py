"""What lies in the run folder after a kill, and what the next attempt makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmray.artifacts.checkpoints import (
    add_part,
    checkpoint_name,
    commit,
    commit_parts,
    committed,
    newest_good,
    remove_old,
    staging_for,
    tidy,
)
from lmray.artifacts.files import MANIFEST, seal, write_json
from lmray.errors import CheckpointError


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / checkpoint_name(step)
    path.mkdir(parents=True)
    (path / "weights").write_text(str(step), encoding="utf-8")
    seal(path, step=step)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_commit_is_a_whole_folder_under_its_steps_name(tmp_path):
    commit(checkpoint(tmp_path / "scratch", 3), tmp_path, 7)
    assert names(tmp_path) == ["checkpoint-00000007", "scratch"]


def test_a_run_folder_that_is_gone_is_not_made_anew(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        commit(checkpoint(tmp_path / "scratch", 3), tmp_path / "mount" / "run", 3)
    assert names(tmp_path) == ["scratch"]


def test_tidying_keeps_the_last_whole_ones_and_removes_what_a_kill_left(tmp_path):
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    (tmp_path / ".checkpoint-00000010.host-1-00000000.tmp" / "adapter").mkdir(parents=True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / ".weights.host-1-00000000.tmp").write_bytes(b"half")
    (tmp_path / "events.jsonl").write_bytes(b"")
    tidy(tmp_path)
    assert names(tmp_path) == ["adapter", "checkpoint-00000004", "checkpoint-00000006", "events.jsonl"]
    assert names(tmp_path / "adapter") == []


def test_the_newest_good_one_is_taken_and_those_before_it_are_named_and_set_aside(tmp_path):
    said = []
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-00000004" / "weights").unlink()
    (tmp_path / "checkpoint-00000006" / MANIFEST).write_text("{", encoding="utf-8")
    assert newest_good(tmp_path, said.append) == tmp_path / "checkpoint-00000002"
    assert "no readable manifest" in said[0] and "checkpoint-00000006 is set aside" in said[0]
    assert "weights: is missing" in said[1] and "going on from checkpoint-00000002" in said[1]
    assert [path.name for path in committed(tmp_path)] == ["checkpoint-00000002"]
    assert {"rejected-checkpoint-00000004", "rejected-checkpoint-00000006"} <= set(names(tmp_path))
    checkpoint(tmp_path, 5)
    remove_old(tmp_path)
    assert names(tmp_path) == ["checkpoint-00000002", "checkpoint-00000005", "rejected-checkpoint-00000006"]


def test_a_manifest_that_was_lost_is_said_and_the_one_before_is_taken(tmp_path):
    said = []
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-00000006" / MANIFEST).unlink()
    tidy(tmp_path)
    assert newest_good(tmp_path, said.append) == tmp_path / "checkpoint-00000004"
    assert said == [
        f"warning: {tmp_path / 'checkpoint-00000006'}: has no manifest; checkpoint-00000006 is set aside, going on "
        "from checkpoint-00000004"
    ]
    assert names(tmp_path) == ["checkpoint-00000002", "checkpoint-00000004", "rejected-checkpoint-00000006"]


def test_what_a_killed_writer_left_is_not_worth_a_word(tmp_path):
    checkpoint(tmp_path, 2)
    half = staging_for(tmp_path, 4)
    add_part(checkpoint(tmp_path / "scratch", 4), half, 0)
    tidy(tmp_path)
    said = []
    assert newest_good(tmp_path, said.append) == tmp_path / "checkpoint-00000002"
    assert said == [] and names(tmp_path) == ["checkpoint-00000002", "scratch"]


def test_a_checkpoint_of_which_parts_are_not_seen_is_not_committed(tmp_path):
    staging = staging_for(tmp_path, 4)
    for rank in (0, 1):
        (tmp_path / "scratch" / str(rank)).mkdir(parents=True)
        write_json(tmp_path / "scratch" / str(rank) / f"of-{rank}.json", rank)
        seal(tmp_path / "scratch" / str(rank), step=4)
    add_part(tmp_path / "scratch" / "0", staging, 0)
    with pytest.raises(FileNotFoundError, match="part-00001"):
        commit_parts(staging, tmp_path, 4, num_parts=2)
    assert committed(tmp_path) == []
    add_part(tmp_path / "scratch" / "1", staging, 1)
    commit_parts(staging, tmp_path, 4, num_parts=2)
    assert newest_good(tmp_path, print) == tmp_path / "checkpoint-00000004"
    commit_parts(staging, tmp_path, 4, num_parts=2)  # again, as where only the last of it failed
    assert newest_good(tmp_path, print) == tmp_path / "checkpoint-00000004"


def test_an_older_one_without_manifest_goes_once_the_run_is_past_it(tmp_path):
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-00000004" / MANIFEST).unlink()
    remove_old(tmp_path)
    assert names(tmp_path) == ["checkpoint-00000002", "checkpoint-00000006"]


def test_a_run_whose_only_checkpoint_lost_its_manifest_does_not_start_over_in_silence(tmp_path):
    (checkpoint(tmp_path, 2) / MANIFEST).unlink()
    tidy(tmp_path)
    with pytest.raises(CheckpointError, match="has no manifest; no checkpoint of this run is good"):
        newest_good(tmp_path, print)
    assert names(tmp_path) == ["checkpoint-00000002"]


def test_none_at_all_is_a_fresh_start_and_none_good_is_an_error(tmp_path):
    assert newest_good(tmp_path, print) is None
    (checkpoint(tmp_path, 2) / "weights").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no checkpoint of this run is good"):
        newest_good(tmp_path, print)
    assert names(tmp_path) == ["checkpoint-00000002"]
