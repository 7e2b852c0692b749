"""JSON written part by part is JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmray.serve.json_text import json_parts

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@given(VALUES)
def test_parts_are_the_whole(value):
    assert "".join(json_parts(value)) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@pytest.mark.parametrize("num", [0, 1, 255, 256, 257, 1000])
@pytest.mark.parametrize("item", [1, {"a": [1]}, "\u65e5"])
def test_no_part_is_long(num, item):
    value = {"choices": [{"logprobs": [item] * num}] * 3}
    parts = list(json_parts(value))
    assert json.loads("".join(parts)) == value
    assert max(map(len, parts)) <= 256 * (len(json.dumps(item)) + 1) + 2
