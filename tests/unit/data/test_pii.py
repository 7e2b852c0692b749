"""What tells who somebody is: found by the library's recognisers, in every piece that a text comes in."""

from __future__ import annotations

import logging
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lmray.data.filters._segments import Span
from lmray.data.filters.pii import Pii, joined
from lmray.errors import ConfigError

FOUND = {
    "taro.yamada@example.co.jp": "EMAIL_ADDRESS",
    "4111 1111 1111 1111": "CREDIT_CARD",
    "5500-0000-0000-0004": "CREDIT_CARD",
    "DE89 3704 0044 0532 0130 00": "IBAN_CODE",
    "GB29 NWBK 6016 1331 9268 19": "IBAN_CODE",
    "+1 (415) 555-2671 ext. 55": "PHONE_NUMBER",
    "090-1234-5678": "PHONE_NUMBER",
    "０９０ー１２３４ー５６７８": "PHONE_NUMBER",
    "192.168.0.1": "IP_ADDRESS",
    "2001:db8::1": "IP_ADDRESS",
    "219-09-9999": "US_SSN",
    "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa": "CRYPTO",
}
PLAIN = [
    "the",
    "card",
    "見出し",
    "番号は",
    "です。",
    "4111 1111 1111 1112",
    "1999",
    "DE89 3704 0044 0532 0130 01",
]


@pytest.fixture(scope="module", autouse=True)
def _library():
    pytest.importorskip("presidio_analyzer", reason="needs the extra lmray[pii]")


def passed(text: str, sizes: list[int], **fields) -> tuple[str, list[str], bool]:
    way, sent, found, place = Pii(**fields).open(), "", [], 0
    for size in [*sizes, len(text)]:
        piece, place = text[place : place + size], place + size
        out, kinds = way.push(piece, last=place >= len(text))
        sent, found = sent + out, found + list(kinds)
        if way.stopped or place >= len(text):
            break
    return sent, found, way.stopped


@pytest.mark.parametrize(("entity", "kind"), FOUND.items())
@pytest.mark.parametrize("around", ["{}", "call {} now", "連絡先は{}です。", "「{}」", '{{"a": "{}"}}', "<{}>, (b)"])
def test_what_is_found(entity, kind, around):
    text = around.format(entity)
    assert passed(text, []) == (around.format(f"<{kind}>"), [kind], False)
    assert passed(text, [], action="refuse")[1:] == ([kind], True)


@pytest.mark.parametrize(
    "text", [*PLAIN, "日本語の文章です。価格は１，２００円。", "on 2024-01-02 at 12:30, v1.2, 3.14159"]
)
def test_other_text_is_unharmed(text):
    assert passed(text, []) == (text, [], False)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([*FOUND, *PLAIN]), st.sampled_from([" and ", "と", "\n", ", so "])), max_size=6),
    st.lists(st.integers(1, 9), max_size=80),
)
def test_streamed_is_whole_and_no_half_of_anything_goes_out(parts, sizes):
    text = "".join(word + gap for word, gap in parts)
    sent, found, _ = passed(text, sizes)
    assert (sent, found) == passed(text, [])[:2]
    assert sent == "".join(f"<{FOUND[word]}>{gap}" if word in FOUND else word + gap for word, gap in parts)


def test_only_what_is_asked_for():
    text = "a@example.com or https://example.com/x?y=1"
    assert passed(text, []) == ("<EMAIL_ADDRESS> or https://example.com/x?y=1", ["EMAIL_ADDRESS"], False)
    assert passed(text, [], kinds=["URL", "EMAIL_ADDRESS"])[0] == "<EMAIL_ADDRESS> or <URL>"
    assert passed("03-1234-5678", [], regions=["US"])[1] == []


def test_nothing_is_fetched_and_nothing_logged(monkeypatch, caplog):
    def connect(*args):
        raise AssertionError("reaches for the network")

    monkeypatch.setattr(socket, "getaddrinfo", connect)
    with caplog.at_level(logging.DEBUG):
        assert passed("kim@example.org, DE89 3704 0044 0532 0130 0!", [], regions=["KR"])[1] == ["EMAIL_ADDRESS"]
    assert caplog.records == []


@pytest.mark.parametrize("part", ["a.b-c", "1234 5678 ", "a", "1", "a@", "日本", "::", "http://"])
def test_a_long_text_is_searched_in_parts(part):
    """Whole, some of them take minutes."""
    assert passed(part * 4000, [], kinds=[*Pii().kinds, "URL"])[2] is False


def test_matches_that_overlap_are_one():
    spans = [
        (0.5, Span(4, 9, "URL")),
        (1.0, Span(0, 9, "EMAIL_ADDRESS")),
        (0.4, Span(8, 12, "US_SSN")),
        (0.4, Span(12, 13, "URL")),
    ]
    assert joined(spans) == [Span(0, 12, "EMAIL_ADDRESS"), Span(12, 13, "URL")]


def test_a_country_is_two_letters():
    with pytest.raises(ValidationError, match="`Japan` is no country"):
        Pii(regions=("Japan",))
    with pytest.raises(ConfigError, match=r"`UK` is no country with telephone numbers(.|\n)*hint: .*`GB`"):
        Pii(regions=("UK",)).check()


def test_digits_of_other_scripts_are_digits():
    number = "".join(chr(0x660 + int(digit)) for digit in "01001234567")  # Arabic-Indic
    assert passed(number, [], regions=["EG"])[1] == ["PHONE_NUMBER"]
