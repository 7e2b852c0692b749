"""Text searched part by part: what passes is told by the text, not by where pieces are cut."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmray.data.filters._segments import MAX_LENGTH, Segments, Span, plain

NUMBER = re.compile(r"\b[A-Z]{2}\d\d(?: \w{1,4}){2,6}\b|\b\d{4}(?: \d{4}){3}\b|[\w.]+@[\w.]+\w")
WORDS = st.sampled_from(
    [
        "4111 1111 1111 1111",
        "a.b@c.de",
        "GB29 NWBK 6016 13",
        "the",
        "a",
        "1999",
        "-",
        "日本",
        "\n",
        "  ",
        "x" * 300,
        "@",
        "",
    ]
)
TEXTS = st.lists(st.tuples(WORDS, st.sampled_from(["", " ", ", "])), max_size=12).map(
    lambda parts: "".join(word + gap for word, gap in parts)
)


def search(text: str) -> list[Span]:
    return [Span(one.start(), one.end(), "N") for one in NUMBER.finditer(text)]


def passed(text: str, sizes: list[int], replace=lambda kind: f"<{kind}>") -> tuple[str, list[str], bool]:
    way, sent, found, place = Segments(search, replace), "", [], 0
    for size in [*sizes, len(text)]:
        piece, place = text[place : place + size], place + size
        out, kinds = way.push(piece, last=place >= len(text))
        sent, found = sent + out, found + kinds
        if way.stopped or place >= len(text):
            break
    return sent, found, way.stopped


@given(TEXTS, st.lists(st.integers(1, 40), max_size=60))
def test_streamed_is_whole(text, sizes):
    assert passed(text, sizes) == passed(text, [])
    assert passed(text, sizes, None) == passed(text, [], None)


@given(TEXTS, st.lists(st.integers(1, 40), max_size=60))
def test_nothing_is_held_back_for_longer_than_a_part(text, sizes):
    way, place = Segments(lambda text: [], None), 0
    sent = 0
    for size in sizes:
        out, _ = way.push(text[place : place + size], last=False)
        place, sent = min(place + size, len(text)), sent + len(out)
        assert place - sent <= MAX_LENGTH


@given(st.lists(st.sampled_from(["4111 1111 1111 1111", "a.b@c.de", "the card", "was", "日本", "番号は"]), max_size=8))
def test_matches_in_sentences_are_those_of_the_whole_text(words):
    text = " ; ".join(words)
    assert passed(text, []) == (NUMBER.sub("<N>", text), ["N"] * len(NUMBER.findall(text)), False)


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("before", [0, 100, 200, 250, 255, 300])
def test_a_match_longer_than_a_part_goes_out_nowhere(before, size):
    text = "1 " * (before // 2) + "x" * 60 + "@" + "y." * 300 + "de and more"
    sent, found, _ = passed(text, [size] * 1000)
    assert sent == "1 " * (before // 2) + "<N> and more"
    assert found == ["N"]


def test_a_number_without_end_is_held_back_in_part_only():
    way = Segments(search, None)
    assert way.push("1" * MAX_LENGTH, last=False) == ("1" * (MAX_LENGTH // 2), [])


def test_what_is_refused_ends_the_text_before_it():
    assert passed("mail to a@b.de. More", [3] * 9, None) == ("mail to ", ["N"], True)


@pytest.mark.parametrize(
    ("text", "read"),
    [("０９０ー１２３４", "090-1234"), ("カードa＠b．de", "\n-\na@b.de"), ("กข5한", "\n\n5\n"), ("é\u00a0x", "é x")],
)
def test_text_is_read_character_for_character(text, read):
    assert plain(text) == read and len(text) == len(read)
