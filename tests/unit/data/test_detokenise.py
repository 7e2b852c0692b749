"""Text that grows token by token: whole characters, and nothing of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lmray.data.detokenise import REPLACEMENT, Detokeniser, StopStrings
from lmray.testing.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BYTES = bytes_to_unicode()
TEXTS = ["plain", "日本語のテスト", "🙂👨‍👩‍👧‍👦🏳️‍🌈", "é ñ ü", "a日b🙂c", "", " leading", "x" * 300 + "語" * 60]


def decode(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def pieces(ids: list[int]) -> list[str]:
    detokeniser = Detokeniser(decode)
    return [*(detokeniser.push(token_id) for token_id in ids), detokeniser.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_become_whole_characters_and_all_of_the_text(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode()), "one token a byte, so that every character is split"
    found = pieces(ids)
    assert "".join(found) == text
    assert not any(REPLACEMENT in piece for piece in found)


@given(st.text(max_size=40), st.data())
def test_any_text_cut_anywhere_gives_what_decoding_it_whole_gives(text, data):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    end = data.draw(st.integers(0, len(ids)))
    assert "".join(pieces(ids[:end])) == decode(ids[:end])


@given(st.lists(st.integers(3, 258), max_size=200))
def test_bytes_that_are_no_text_end_and_are_never_held_for_long(ids):
    detokeniser = Detokeniser(decode)
    sent = ""
    for place, token_id in enumerate(ids):
        sent += detokeniser.push(token_id)
        assert len(decode(ids[: place + 1])) - len(sent) <= 3
    assert sent + detokeniser.finish() == decode(ids)


@pytest.mark.parametrize("text", [b"\x80", b"\xe6\x97", b"a\xf0\x9f"])
def test_what_is_never_a_character_is_not_decoded_ever_longer(text):
    [*ids] = (TOKENIZER.convert_tokens_to_ids(BYTES[byte]) for byte in text * 300)
    longest = 0

    def counted(window: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(window))
        return decode(window)

    detokeniser = Detokeniser(counted)
    assert "".join(detokeniser.push(one) for one in ids) + detokeniser.finish() == decode(ids)
    assert longest < 100


def test_special_tokens_are_no_text():
    ids = TOKENIZER("a<|im_end|>b", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(ids)) == "ab"


def cut(stops: list[str], parts: list[str]) -> tuple[list[str], bool]:
    stop = StopStrings(stops)
    found = [stop.push(part) for part in parts]
    return [*found, stop.finish()], stop.stopped


@pytest.mark.parametrize(
    ("stops", "parts", "expected"),
    [
        (["END"], ["abc", "E", "N", "D", "more"], ["abc", "", "", "", "", ""]),
        (["END"], ["abEN", "Dx"], ["ab", "", ""]),
        (["END"], ["abE", "xEN"], ["ab", "Ex", "EN"]),
        (["aab"], ["aa", "ab"], ["", "a", ""]),
        (["\n\n", "。"], ["日本。語"], ["日本", ""]),
        (["b", "ab"], ["xab"], ["x", ""]),
        (["b", "aba"], ["aaba"], ["aa", ""]),
        (["b", "aba"], ["aab", "a"], ["aa", "", ""]),
        ([], ["a", "b"], ["a", "b", ""]),
    ],
)
def test_stop_strings_end_the_text_wherever_it_was_cut(stops, parts, expected):
    found, stopped = cut(stops, parts)
    assert found == expected
    assert stopped == any(stop in "".join(parts) for stop in stops)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_any_cut_gives_the_text_before_the_stop_string_complete_first(text, stops, data):
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    ends = [(end, end - len(stop)) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    found, stopped = cut(stops, parts)
    assert "".join(found) == (text[: min(ends)[1]] if ends else text)
    assert stopped == bool(ends)
