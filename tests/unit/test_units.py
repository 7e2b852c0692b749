"""Numbers with units, for people."""

from __future__ import annotations

import pytest

from lmray.units import human_bytes, human_count, human_seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (3 * 2**40, "3072.0 GiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_bytes(value, text):
    assert human_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1500, "1.5k"), (134515008, "134.5M"), (8e9, "8.0B")]
)
def test_counts(value, text):
    assert human_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0 s"),
        (3.14, "3.1 s"),
        (59.94, "59.9 s"),
        (59.97, "1 min 00 s"),
        (65, "1 min 05 s"),
        (3599.6, "1 h 00 min"),
        (3725, "1 h 02 min"),
        (90000, "25 h 00 min"),
    ],
)
def test_seconds(value, text):
    assert human_seconds(value) == text
