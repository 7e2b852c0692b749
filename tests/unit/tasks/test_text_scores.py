"""Scores of free text, against hand-made values and the libraries' own."""

from __future__ import annotations

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from lmray.registry import TASKS
from lmray.tasks.bleu import Bleu
from lmray.tasks.chrf import Chrf
from lmray.tasks.exact_match import ExactMatch
from lmray.tasks.f1 import F1
from lmray.tasks.rouge import Rouge

ENGLISH = [
    ("The cat sat on the mat.", "the cat sat on a mat"),
    ("It is raining in the old town today.", "It rains in the old town."),
    ("Nothing.", "Something else entirely, and longer."),
]
JAPANESE = [
    ("今日は東京で雨が降っています。", "今日は東京で雨です。"),
    ("猫がマットの上に座った。", "犬がマットの上に座っている。"),
]


@pytest.mark.parametrize(
    ("answer", "alike", "strict"),
    [
        ("The Eiffel Tower", 1.0, 1.0),
        (" The Eiffel Tower\n", 1.0, 1.0),
        ("eiffel  tower.", 1.0, 0.0),
        ("tower", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_exact_match(example, answer, alike, strict):
    found = ExactMatch().score(example("The Eiffel Tower"), answer)
    assert found == {"exact_match": alike, "exact_match_strict": strict}


def test_exact_match_of_punctuation_alone_is_strict(example):
    assert ExactMatch().score(example("?!"), "...") == {"exact_match": 0.0, "exact_match_strict": 0.0}
    assert ExactMatch().score(example("?!"), "?!") == {"exact_match": 1.0, "exact_match_strict": 1.0}


def test_exact_match_in_japanese(example):
    assert ExactMatch().score(example("東京タワー"), "「東京タワー」。") == {
        "exact_match": 1.0,
        "exact_match_strict": 0.0,
    }


@pytest.mark.parametrize(
    ("expected", "answer", "f1"),
    [
        ("the red house", "a red car", 2 * 0.5 * 0.5 / 1.0),  # articles gone: red house, red car
        ("red red", "red", 2 * 1 * 0.5 / 1.5),  # a word counts as often as both have it
        ("東京都", "東京", 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("x", "", 0.0),
        ("the", "the", 1.0),
    ],
)
def test_f1(example, expected, answer, f1):
    assert F1().score(example(expected), answer)["f1"] == pytest.approx(f1)


@pytest.mark.parametrize("pair", ENGLISH)
def test_english_rouge_is_the_packages_own(example, pair):
    expected, answer = pair
    own = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(expected, answer)
    assert Rouge().score(example(expected), answer) == {name: own[name].fmeasure for name in own}


def test_rouge_in_japanese_counts_letters(example):
    found = Rouge().score(example("猫が座る"), "犬が座る")
    assert found["rouge1"] == pytest.approx(3 / 4)
    assert found["rouge2"] == pytest.approx(2 / 3)
    assert found["rougeL"] == pytest.approx(3 / 4)


@pytest.mark.parametrize("tokenize", ["13a", "intl", "char"])
@pytest.mark.parametrize("pairs", [ENGLISH, JAPANESE], ids=["english", "japanese"])
def test_bleu_is_sacrebleus_own(metrics, pairs, tokenize):
    expected, answers = zip(*pairs, strict=True)
    own = sacrebleu.corpus_bleu(list(answers), [list(expected)], tokenize=tokenize).score
    assert metrics(Bleu(tokenize=tokenize), *pairs) == {"bleu": pytest.approx(own / 100)}


def test_bleu_of_japanese_needs_characters(metrics):
    assert metrics(Bleu(tokenize="char"), *JAPANESE)["bleu"] > 0.3 > 0.0 == metrics(Bleu(), *JAPANESE)["bleu"]


def test_bleu_is_no_mean_of_sentences(metrics, example):
    mean = sum(Bleu().score(example(expected), answer)["bleu"] for expected, answer in ENGLISH) / len(ENGLISH)
    assert abs(metrics(Bleu(), *ENGLISH)["bleu"] - mean) > 0.005


@pytest.mark.parametrize("word_order", [0, 2])
@pytest.mark.parametrize("pairs", [ENGLISH, JAPANESE], ids=["english", "japanese"])
def test_chrf_is_sacrebleus_own(metrics, pairs, word_order):
    expected, answers = zip(*pairs, strict=True)
    own = sacrebleu.corpus_chrf(list(answers), [list(expected)], word_order=word_order).score
    assert metrics(Chrf(word_order=word_order), *pairs) == {"chrf": pytest.approx(own / 100)}


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match="tokenize"):
        TASKS.load("bleu").model_validate({"tokenize": "ja-mecab"})
