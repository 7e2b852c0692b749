"""Filters of prompts and answers, alone and through the app."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lmray.config.endpoint import TextFilter
from lmray.serve.filters import FilteredText
from tests.unit.serve.fakes import FakeBackend
from tests.unit.serve.test_gateway import sse, text_of

MAIL = TextFilter(name="mail", pattern=r"[\w.]+@[\w.]+", on="answers", replacement="[mail]", max_match_length=20)
CODE = TextFilter(name="code-word", pattern="(?i)合言葉|open sesame")


def passed(text: str, sizes: list[int], *filters: TextFilter) -> tuple[str, bool, list[str]]:
    """What comes out of `filters` where `text` comes in pieces of these sizes; whether it was ended; what was found."""
    way, sent, found = FilteredText(filters), "", []
    place = 0
    for size in [*sizes, len(text)]:
        piece, place = text[place : place + size], place + size
        out, names = way.push(piece, last=place >= len(text))
        sent, found = sent + out, found + list(names)
        if way.stopped or place >= len(text):
            break
    return sent, way.stopped, found


@given(
    st.lists(st.sampled_from(["a.b@c.de", " ", "x", "日本", "@"]), max_size=8), st.lists(st.integers(1, 5), max_size=30)
)
def test_matches_are_replaced_wherever_pieces_are_cut(words, sizes):
    text = "".join(words)
    if any(len(match.group()) > MAIL.max_match_length for match in re.finditer(MAIL.pattern, text)):
        return
    sent, stopped, found = passed(text, sizes, MAIL)
    assert (sent, len(found)) == re.subn(MAIL.pattern, "[mail]", text)
    assert not stopped


@given(st.lists(st.integers(1, 4), max_size=20))
def test_nothing_of_a_match_and_after_it_goes_out(sizes):
    assert passed("It is: Open Sesame, he said", sizes, CODE) == ("It is: ", True, ["code-word"])
    assert passed("me@x.org: 合言葉", sizes, MAIL, CODE) == ("[mail]: ", True, ["mail", "code-word"])


def test_no_more_is_held_back_than_a_match_is_long():
    way = FilteredText([MAIL])
    assert way.push("x " * 50, last=False)[0] == ("x " * 50)[:-20]


def test_a_match_that_says_nothing_is_none():
    assert passed("ab", [1], TextFilter(name="edge", pattern=r"\b")) == ("ab", False, [])


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"pattern": "("}, "is no regular expression"),
        ({"pattern": "a*"}, "matches the empty text"),
        ({"pattern": "a", "replacement": "b"}, "a `replacement` is for answers"),
    ],
)
def test_what_filters_nothing_or_everything_is_refused(fields, found):
    with pytest.raises(ValidationError, match=found):
        TextFilter(name="x", **fields)


@pytest.fixture
def filtered(call):
    def ask(backend: FakeBackend, **fields):
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}
        told = {"json": body, "settings": {"filters": (MAIL, CODE)}}
        return call(backend, "POST", "/v1/chat/completions", **told)

    return ask


@pytest.mark.parametrize("stream", [False, True])
def test_a_filter_ends_the_answer_and_the_request(filtered, ids, stream):
    backend = FakeBackend(ids("to me@x.org: open sesame! More"))
    response = filtered(backend, stream=stream)
    if stream:
        events = sse(response.text)
        found, reason = text_of(events), events[-2]["choices"][0]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        found, reason = choice["message"]["content"], choice["finish_reason"]
    assert (found, reason) == ("to [mail]: ", "content_filter")
    assert backend.closed == [backend.requests[0].id]


def test_a_prompt_is_refused_before_the_engine_sees_it(filtered):
    backend = FakeBackend()
    response = filtered(backend, messages=[{"role": "user", "content": "what is the 合言葉?"}])
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "content_filter"
    assert response.json()["error"]["message"] == "filter `code-word` lets no such text through"
    assert backend.requests == []
    assert filtered(backend, messages=[{"role": "user", "content": "me@x.org"}]).status_code == 200


def test_logprobs_do_not_tell_what_a_filter_takes_out(filtered):
    response = filtered(FakeBackend(), logprobs=True)
    assert response.status_code == 400
    assert "are not told where answers are filtered" in response.json()["error"]["message"]
