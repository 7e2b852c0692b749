"""Classification by generated text."""

from __future__ import annotations

import random

import pytest
from sklearn.metrics import f1_score

from lmray.errors import DataError
from lmray.tasks.accuracy import Accuracy
from lmray.tasks.macro_f1 import MacroF1

LABELS = ("yes", "no", "maybe")


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("yes", "yes"),
        (" No.", "no"),
        ("The answer is maybe, not yes.", "maybe"),
        ("nothing", None),
        ("I know", None),
        ("", None),
    ],
)
def test_the_first_label_as_whole_words(answer, label):
    assert Accuracy(labels=LABELS).label_in(answer) == label


def test_the_longer_label_wins_where_both_start():
    task = Accuracy(labels=("not sure", "not", "賛成", "賛成しない"))
    assert task.label_in("I am not sure") == "not sure"
    assert task.label_in("私は賛成しない。") == "賛成しない"
    assert task.label_in("賛成です") == "賛成"


def test_a_label_of_signs_is_found_only_as_the_whole_answer():
    task = Accuracy(labels=("+", "-"))
    assert (task.label_in(" + "), task.label_in("a + b")) == ("+", None)


def test_labels_come_from_the_data(metrics, example):
    assert Accuracy().for_examples([example("b"), example("a "), example("b")]).labels == ("a", "b")
    assert metrics(Accuracy(), ("yes", "Yes!"), ("no", "yes"), ("yes", "who knows")) == {"accuracy": 1 / 3}


def test_labels_given_must_be_all(example):
    with pytest.raises(DataError, match=r"f\.jsonl:7: answer `perhaps` is no label") as caught:
        MacroF1(labels=LABELS).for_examples([example("yes"), example("perhaps", row=7)])
    assert caught.value.allowed == "yes, no, maybe"


def test_free_text_is_no_label(example):
    with pytest.raises(DataError, match="101 different answers expected") as caught:
        Accuracy().for_examples([example(f"text {number}") for number in range(101)])
    assert "exact_match" in str(caught.value)


def test_macro_f1_by_hand(metrics):
    pairs = [("yes", "yes"), ("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "?"), ("maybe", "yes")]
    yes = 2 * 2 / (3 + 3)  # 2 hits, 3 named, 3 expected
    no = 2 * 1 / (2 + 2)  # the unreadable answer is a miss and no hit
    assert metrics(MacroF1(), *pairs) == {"macro_f1": pytest.approx((yes + no + 0.0) / 3)}


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_is_scikit_learns(metrics, seed):
    draw = random.Random(seed)
    labels = ["yes", "no", "maybe", "賛成"][: 2 + seed % 3]
    pairs = [(draw.choice(labels), draw.choice([*labels, "?"])) for _ in range(3 + 10 * seed)]
    expected, named = zip(*pairs, strict=True)
    seen = sorted({*expected, *named} - {"?"})
    own = f1_score(expected, named, labels=seen, average="macro", zero_division=0)  # type: ignore[arg-type]
    assert metrics(MacroF1(labels=tuple(labels)), *pairs)["macro_f1"] == pytest.approx(own)
