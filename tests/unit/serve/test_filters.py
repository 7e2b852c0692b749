"""Filters of prompts and answers, alone and through the app."""

from __future__ import annotations

import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lmray.data.filters.base import TextFilter
from lmray.data.filters.regex import Regex
from lmray.errors import ConfigError
from lmray.job import load
from lmray.serve.filters import FilteredText
from tests.unit.serve.fakes import FakeBackend
from tests.unit.serve.test_gateway import TOOL, sse, text_of
from tests.unit.serve.test_tools import TEMPLATE

MAIL = Regex(label="mail", pattern=r"[\w.]+@[\w.]+", on="answers", replacement="[mail]", max_match_length=20)
CODE = Regex(label="code-word", pattern="(?i)合言葉|open sesame")


def passed(text: str, sizes: list[int], *filters: TextFilter) -> tuple[str, bool, list[str]]:
    """What comes out of `filters` where `text` comes in pieces of these sizes; whether it was ended; what was found."""
    way, sent, found = FilteredText(filters), "", []
    place = 0
    for size in [*sizes, len(text)]:
        piece, place = text[place : place + size], place + size
        out, names = way.push(piece, last=place >= len(text))
        sent, found = sent + out, found + [one.label for one in names]
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


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"password(: \S+)?", "my password: hunter2 ok"),
        (r"sk-\w+(-\w+)*", "key sk-abc-def99."),
        (r"\d{4}(-\d{4}){3}|\d{4}", "1234-1234-1234-1234 5678"),
        (r"cat(?!fish)", "catfish, cat"),
        (r"\b\d*", "my card 1234-1234"),
    ],
)
@given(sizes=st.lists(st.integers(1, 6), max_size=30))
def test_a_match_that_may_grow_is_waited_for(pattern, text, sizes):
    hidden = Regex(label="hidden", pattern=pattern, replacement="*", max_match_length=30)
    sent, _, found = passed(text, sizes, hidden)
    ends = [match.group() for match in re.finditer(pattern, text) if match.group()]
    assert sent == re.sub(pattern, lambda match: "*" if match.group() else "", text)
    assert len(found) == len(ends)


@given(st.lists(st.integers(1, 4), max_size=20))
def test_nothing_of_a_match_and_after_it_goes_out(sizes):
    assert passed("It is: Open Sesame, he said", sizes, CODE) == ("It is: ", True, ["code-word"])
    assert passed("me@x.org: 合言葉", sizes, MAIL, CODE) == ("[mail]: ", True, ["mail", "code-word"])


def test_no_more_is_held_back_than_a_match_is_long():
    way = FilteredText([MAIL])
    assert way.push("x " * 50, last=False)[0] == ("x " * 50)[:-20]


def test_a_match_that_says_nothing_is_none():
    assert passed("ab", [1], Regex(label="edge", pattern=r"\b")) == ("ab", False, [])


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"pattern": "("}, "is no regular expression"),
        ({"pattern": "a*"}, "matches the empty text"),
    ],
)
def test_what_filters_nothing_or_everything_is_refused(fields, found):
    with pytest.raises(ValidationError, match=found):
        Regex(label="x", **fields)


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


SIGHT = Regex(label="sight", pattern=r"\bfoo(?<!xfoo)", replacement="*", max_match_length=5)


@given(st.lists(st.sampled_from(["foo", "x", " ", "fo", "o"]), max_size=20), st.lists(st.integers(1, 7), max_size=40))
def test_a_pattern_looks_back_at_what_was_sent(words, sizes):
    text = "".join(words)
    assert passed(text, sizes, SIGHT)[0] == re.sub(SIGHT.pattern, "*", text)


HIDDEN = Regex(label="secret", pattern=r"秘密\d+", replacement="[秘密]")


def test_a_prompt_is_replaced_wherever_it_says_it(call, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    backend = FakeBackend()
    function = {"name": "look", "arguments": '{"秘密1": ["秘密22", 3], "city": "秘密3"}'}
    messages = [
        {"role": "system", "content": "秘密1"},
        {"role": "user", "content": [{"type": "text", "text": "これは秘"}, {"type": "text", "text": "密22です"}]},
        {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": function}]},
        {"role": "tool", "content": "秘密4 秘密5"},
    ]
    body = {"model": "tiny", "messages": messages}
    response = call(backend, "POST", "/v1/chat/completions", json=body, settings={"filters": (HIDDEN,)})
    assert response.status_code == 200
    prompt = tokenizer.decode(backend.requests[0].prompt_ids)
    assert "これは[秘密]です" in prompt and "[秘密] [秘密]" in prompt and prompt.startswith("[秘密]!")
    assert not re.search(r"秘密\d", prompt)
    assert response.json()["usage"]["prompt_tokens"] == len(backend.requests[0].prompt_ids)


def test_prompts_of_tokens_are_replaced_as_texts_are(call, ids, tokenizer):
    for prompt in ("a 秘密12 b", ids("a 秘密12 b"), ["c", "a 秘密12 b"]):
        backend = FakeBackend()
        body = {"model": "tiny", "prompt": prompt, "echo": True}
        response = call(backend, "POST", "/v1/completions", json=body, settings={"filters": (HIDDEN,)})
        assert response.json()["choices"][-1]["text"].startswith("a [秘密] b")
        assert tokenizer.decode(backend.requests[-1].prompt_ids).endswith("a [秘密] b")


ESCAPED = r'<tool_call>{"name": "weather", "arguments": {"city": "bob\u0040x.org", "n": [12345, "\n\u79d8\u5bc69"]}}'
NUMBER = Regex(label="number", pattern=r"12345", replacement="[n]")


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_filtered_as_they_read_and_not_as_they_are_escaped(
    filtered, call, ids, stream, tokenizer, monkeypatch
):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    backend = FakeBackend(ids(f"a@x.org {ESCAPED}</tool_call>"))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": [TOOL], "stream": stream}
    told = {"json": body, "settings": {"filters": (MAIL, NUMBER, HIDDEN)}}
    response = call(backend, "POST", "/v1/chat/completions", **told)
    if stream:
        deltas = [one["choices"][0] for one in sse(response.text)[:-1] if one["choices"]]
        (made,) = [one for delta in deltas for one in delta["delta"].get("tool_calls", ())]
        text = "".join(delta["delta"].get("content") or "" for delta in deltas)
        reason = deltas[-1]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        (made,), text, reason = choice["message"]["tool_calls"], choice["message"]["content"], choice["finish_reason"]
    assert json.loads(made["function"]["arguments"]) == {"city": "[mail]", "n": ["[n]", "\n[秘密]"]}
    assert text.strip() == "[mail]" and reason == "tool_calls"


def test_a_call_that_holds_what_ends_an_answer_is_not_made(filtered, call, ids, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    bad = r'<tool_call>{"name": "weather", "arguments": {"city": "open\u0020sesame"}}</tool_call>'
    choice = filtered(FakeBackend(ids(f"So: {bad} and more")), tools=[TOOL]).json()["choices"][0]
    assert choice["finish_reason"] == "content_filter"
    assert choice["message"]["content"] == "So: " and "tool_calls" not in choice["message"]


def test_decisions_are_logged_and_counted_without_a_word_of_the_text(call, ids, caplog):
    backend = FakeBackend(ids("me@x.org you@x.org: open sesame"))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "秘密770770770, 秘密880880880"}]}
    told = {"json": body, "headers": {"x-request-id": "r-1"}, "settings": {"filters": (HIDDEN, MAIL, CODE)}}
    with caplog.at_level(logging.INFO):
        call(backend, "POST", "/v1/chat/completions", **told)
        refused = [{"role": "user", "content": "open sesame, open sesame"}]
        call(backend, "POST", "/v1/chat/completions", **{**told, "json": {**body, "messages": refused}})
    lines = [record.getMessage() for record in caplog.records if record.name == "lmray.serve.filters"]
    assert lines == [
        "request=r-1 filter=secret on=prompts action=redact secret=2",
        "request=r-1 filter=mail on=answers action=redact mail=2",
        "request=r-1 filter=code-word on=answers action=refuse code-word=1",
        "request=r-1 filter=code-word on=prompts action=refuse code-word=1",
    ]
    assert not any(word in caplog.text for word in ("x.org", "sesame", "秘密", "770770", "880880"))


def test_a_filter_is_a_member_of_its_family(tmp_path):
    fields = {"kind": "serve", "name": "x", "model": {"source": "y"}, "engine": "native"}
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps({**fields, "filters": [{"name": "regex", "pattern": "a"}, "pii"]}))
    assert [one.title for one in load(path).filters] == ["regex", "pii"]
    path.write_text(json.dumps({**fields, "filters": [{"name": "code", "pattern": "a"}]}))
    with pytest.raises(ConfigError, match=r"unknown filter of texts `code`(.|\n)*allowed: pii, regex"):
        load(path)
