"""Bodies of requests: their length, their time, and what counts as JSON."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from lmray.config.endpoint import HttpLimits
from lmray.serve.body import decode
from lmray.serve.failures import RequestError
from tests.unit.serve.fakes import FakeBackend


@pytest.mark.parametrize("value", [{"a": [1, 2.5, "日本語🙂", None, True]}, [], "x", 1e300, -0.0])
def test_json_is_read_as_it_is(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), "\ufeff" + json.dumps(value)):
        assert decode(text.encode()) == value


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"{", "Expecting property name"),
        (b'{"a": 1} {}', "Extra data"),
        (b"{'a': 1}", "Expecting property name"),
        (b'{"a": 1,}', ""),
        (b'{"a": "\n"}', "Invalid control character"),
        (b"\xff", "invalid start byte"),
        (b'"\xed\xa0\x80"', "invalid continuation byte"),
        (b'"\xc0\xaf"', "invalid start byte"),
        (b'"\xe6\x97"', "invalid continuation byte"),
        ("{}".encode("utf-16"), "invalid start byte"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b'{"\\udc00": 1}', "surrogates not allowed"),
        (b"NaN", "NaN is no number"),
        (b'{"a": [-Infinity]}', "-Infinity is no number"),
        (b"1e999", "beyond all range"),
        (b"-1e999", "beyond all range"),
        (b"9" * 5000, "Exceeds the limit"),
        (b"[" * 100_000, "recursion"),
        (b'{"a":' * 100_000, "recursion"),
        (b'{"a": 1, "b": 2, "a": 1}', "`a` is given twice"),
        (b'[{"x": {"a": 1, "a": 2}}]', "`a` is given twice"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_json_or_says_two_things_is_refused(content, found):
    with pytest.raises(RequestError, match="the body is not JSON: ") as refused:
        decode(content)
    assert found in str(refused.value)


def test_a_hundred_megabytes_are_refused_by_their_length_alone(call):
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("read although it said how long it is")
        yield b""

    told = {"content": body(), "headers": {"Content-Length": str(100 * 2**20)}}
    response = call(FakeBackend(), "POST", "/v1/completions", **told)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_a_hundred_megabytes_without_a_length_are_read_up_to_the_limit(call):
    sent = []

    async def body() -> AsyncIterator[bytes]:
        for _ in range(1600):
            sent.append(2**16)
            yield b" " * 2**16

    response = call(FakeBackend(), "POST", "/v1/chat/completions", content=body())
    assert response.status_code == 413
    assert sum(sent) <= HttpLimits().max_body_bytes + 2**16
