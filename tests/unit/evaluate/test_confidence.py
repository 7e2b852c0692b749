"""Intervals of differences, against hand-made cases and a naive twin."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sacrebleu

from lmray.data.base import Example
from lmray.evaluate.confidence import deltas, reference_label
from lmray.tasks.base import Scored
from lmray.tasks.bleu import Bleu
from lmray.tasks.exact_match import ExactMatch
from lmray.tasks.loss import Loss
from lmray.tasks.macro_f1 import MacroF1

EXPECTED = [
    "the red house stands there",
    "a blue car drives by",
    "yes it is so",
    "no it is not so",
    "one more line here",
]
ANSWERS = {
    "base": ["the red car stands there", "a blue car", "no", "no it is not so", "one line"],
    "tuned": ["the red house stands there", "a blue car drives off", "yes it is so", "maybe it is so", "one more line"],
}


def evidence(task, answers):
    examples = [
        Example(({"role": "user", "content": "q"}, {"role": "assistant", "content": one}), "f:1") for one in EXPECTED
    ]
    fitted = task.for_examples(examples)
    scored = [
        Scored(one.answer, text, fitted.score(one, text), fitted.statistics(one, text))
        for one, text in zip(examples, answers, strict=True)
    ]
    return [(fitted, scored)]


def matches(*values: float):
    return [(ExactMatch(), [Scored("", "", {"exact_match": value}) for value in values])]


def quantile(values: list[float], share: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def naive(metric, *, num_resamples: int, seed: int) -> tuple[float, float, float]:
    """Delta and interval of `metric(expected, answers)`, from the texts afresh each time."""
    generator = np.random.default_rng(seed)
    differences = []
    for _ in range(num_resamples):
        chosen = generator.integers(0, len(EXPECTED), len(EXPECTED))
        one, other = (
            metric([EXPECTED[index] for index in chosen], [ANSWERS[label][index] for index in chosen])
            for label in ("tuned", "base")
        )
        differences.append(one - other)
    delta = metric(EXPECTED, ANSWERS["tuned"]) - metric(EXPECTED, ANSWERS["base"])
    return delta, quantile(differences, 0.025), quantile(differences, 0.975)


def corpus_bleu(expected, answers) -> float:
    return min(sacrebleu.corpus_bleu(list(answers), [list(expected)]).score / 100, 1.0)


def share_equal(expected, answers) -> float:
    return sum(one == other for one, other in zip(expected, answers, strict=True)) / len(expected)


@pytest.mark.parametrize(
    ("task", "name", "metric"),
    [(Bleu(), "eval.bleu", corpus_bleu), (ExactMatch(), "eval.exact_match_strict", share_equal)],
    ids=["bleu", "exact_match"],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_a_naive_twin_finds_the_same(task, name, metric, seed):
    targets = {label: evidence(task, answers) for label, answers in ANSWERS.items()}
    found = deltas(targets, num_resamples=200, seed=seed)["tuned"][name]
    assert (found.delta, found.low, found.high) == pytest.approx(naive(metric, num_resamples=200, seed=seed), abs=1e-12)


def test_by_hand_better_by_the_same_on_every_example():
    found = deltas({"base": matches(0, 0, 0, 0), "tuned": matches(1, 1, 1, 1)})["tuned"]["eval.exact_match"]
    assert (found.delta, found.low, found.high, found.num_examples) == (1.0, 1.0, 1.0, 4)


def test_by_hand_two_examples_that_disagree():
    """Of four equally likely resamples one is all better, one all worse: beyond 2.5 % on both sides."""
    found = deltas({"base": matches(0, 1), "tuned": matches(1, 0)})["tuned"]["eval.exact_match"]
    assert (found.delta, found.low, found.high) == (0.0, -1.0, 1.0)


def test_pairing_takes_out_what_examples_share():
    """Every example is a little better: sure, however much the examples differ among themselves."""
    hard = [0.0, 0.9] * 10
    found = deltas({"base": matches(*hard), "tuned": matches(*[one + 0.1 for one in hard])})["tuned"][
        "eval.exact_match"
    ]
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_losses_weigh_by_tokens_in_every_resample():
    def sums(*pairs):
        return [(Loss(), [Scored("", "", {}, pair) for pair in pairs])]

    found = deltas({"base": sums((9.0, 3), (1.0, 1)), "tuned": sums((6.0, 3), (1.0, 1))}, num_resamples=400)["tuned"]
    assert found["eval.loss"].delta == pytest.approx(7 / 4 - 10 / 4)
    assert (found["eval.loss"].low, found["eval.loss"].high) == (pytest.approx(-1.0), pytest.approx(0.0))
    assert found["eval.perplexity"].delta == pytest.approx(math.exp(7 / 4) - math.exp(10 / 4))


def test_a_corpus_metric_that_needs_all_labels_is_made_afresh():
    targets = {label: evidence(MacroF1(), answers) for label, answers in ANSWERS.items()}
    found = deltas(targets, num_resamples=50)["tuned"]["eval.macro_f1"]
    assert found.delta == pytest.approx(2 / 5 - 1 / 5) and found.low <= found.delta <= found.high


def test_everything_is_compared_with_base_or_else_the_first():
    assert (reference_label(["a", "base"]), reference_label(["b", "a"])) == ("base", "b")
    found = deltas({"a": matches(1, 1), "base": matches(1, 0), "c": matches(0, 0)}, num_resamples=10)
    assert {label: one["eval.exact_match"].delta for label, one in found.items()} == {"a": 0.5, "c": -0.5}


def test_one_target_has_nothing_to_be_compared_with():
    assert deltas({"base": matches(1.0)}) == {}
