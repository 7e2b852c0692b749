"""A write waits for a store that is full or away, and not for ever."""

from __future__ import annotations

import errno
import os
import shutil

import pytest

from lmray.artifacts.patience import FIRST_PAUSE_S, LONGEST_PAUSE_S, TOTAL_S, Patience, passing
from lmray.errors import CheckpointError

AWAY = [errno.ENOSPC, errno.EIO, errno.ENOENT, errno.ESTALE, errno.EACCES, errno.EROFS, errno.EDQUOT]


class Time:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.pauses, self.said = 0.0, [], []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def patience(self) -> Patience:
        return Patience(say=self.said.append, clock=lambda: self.now, sleep=self.sleep)


def failing(times: int, error: BaseException):
    left = iter(range(times))

    def write() -> str:
        if next(left, None) is not None:
            raise error
        return "written"

    return write


@pytest.mark.parametrize("number", AWAY)
def test_it_waits_with_growing_pauses_and_says_so_once_at_either_end(number):
    time = Time()
    assert time.patience()("writing x", failing(8, OSError(number, "", "/store/x")), hint="") == "written"
    assert time.pauses == sorted(time.pauses)
    assert (time.pauses[0], time.pauses[-1]) == (FIRST_PAUSE_S, LONGEST_PAUSE_S)
    first, last = time.said
    assert os.strerror(number) in first and "/store/x" in first and "10 min" in first
    assert last == "writing x: done, the run goes on"


def test_a_write_that_works_says_nothing():
    time = Time()
    assert time.patience()("writing x", lambda: 7, hint="") == 7
    assert (time.said, time.pauses) == ([], [])


def test_it_gives_up_after_the_time_with_the_hint():
    time = Time()
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        time.patience()("writing x", failing(10**6, OSError(errno.ENOSPC, "")), hint="checkpoint-4 is good")
    assert time.now == TOTAL_S
    assert (caught.value.where, caught.value.hint, caught.value.exit_code) == ("writing x", "checkpoint-4 is good", 1)
    assert len(time.said) == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), NotADirectoryError(errno.ENOTDIR, ""), OSError("no number")])
def test_what_no_waiting_mends_passes_at_once(error):
    time = Time()
    with pytest.raises(type(error)):
        time.patience()("writing x", failing(1, error), hint="")
    assert time.said == []


def test_a_folder_that_could_not_be_copied_is_waited_for(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(shutil.Error) as caught:
        shutil.copytree(tmp_path / "source", tmp_path / "target")
    assert "No such file" in (passing(caught.value) or "")


def test_errors_of_libraries_in_rust_carry_the_number_in_their_text():
    serialise = 'Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space left" }'
    assert passing(Exception(serialise)) == os.strerror(errno.ENOSPC)
    assert passing(Exception("No space left on device (os error 28)")) == os.strerror(errno.ENOSPC)
    assert passing(Exception("not a directory (os error 20)")) is None
