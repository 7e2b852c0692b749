from __future__ import annotations

import io
import json

import pytest

from lmray.evaluate.progress import FILE, ProgressFile, follow
from lmray.metrics.display import Standing


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_the_file_is_written_now_and_then_and_at_the_end(tmp_path, clock):
    file = ProgressFile(tmp_path, clock=clock)

    def done_in_file() -> int:
        return json.loads((tmp_path / FILE).read_text(encoding="utf-8"))["done"]

    file.tell(Standing("基: answers", 1, 9))
    file.tell(Standing("基: answers", 2, 9))
    assert done_in_file() == 1
    clock.now = 1.0
    file.tell(Standing("基: answers", 3, 9))
    assert done_in_file() == 3
    file.tell(Standing("基: answers", 9, 9))
    assert done_in_file() == 9


def test_follow_shows_the_last_standing_and_forgets_an_earlier_runs(tmp_path):
    ProgressFile(tmp_path).tell(Standing("old: answers", 7, 7))
    stream = io.StringIO()
    with follow(tmp_path, stream=stream):
        assert not (tmp_path / FILE).exists()
        ProgressFile(tmp_path).tell(Standing("base: answers", 12, 60))
    assert stream.getvalue().startswith("base: answers 12/60  ") and "old" not in stream.getvalue()
