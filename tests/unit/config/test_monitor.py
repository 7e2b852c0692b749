"""The section of a serve job that says what is watched."""

from __future__ import annotations

import pytest

from lmray.config import Document, decode
from lmray.config.monitor import Monitor
from lmray.errors import ConfigError


def test_nothing_is_watched_or_kept_unless_asked_for():
    told = Monitor()
    assert (told.sample_fraction, told.retention) == (0.0, 0)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"refusals": ["("]}, "is no regular expression"),
        ({"refusals": ["x*"]}, "matches the empty text, and so every answer"),
        ({"sample_fraction": 1.5}, "sample_fraction"),
        ({"window": 5}, "window"),
        ({"false_alarms": 0}, "false_alarms"),
        ({"retention": -1}, "retention"),
        ({"baseline": "stage"}, "baseline"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(fields, found):
    with pytest.raises(ConfigError, match=found):
        decode(Monitor, Document("test", fields))
