"""When a new version is taken back, and who gets to see it before."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmray.policies.canary import Moments, Rule, Tally, objection, takes_canary

RULE = Rule(min_requests=50)


def tally(seed: int, *, count: int = 400, error_rate: float = 0.01, seconds: float = 0.2, score: float = 0.8) -> Tally:
    """Requests drawn with those rates."""
    draw, found = random.Random(seed), Tally()
    for _ in range(count):
        if draw.random() < error_rate:
            found = found.failed()
        else:
            found = found.answered(seconds * math.exp(draw.gauss(0, 0.5))).scored(draw.gauss(score, 0.2))
    return found


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=50))
def test_moments_are_mean_and_variance_of_the_mean(values):
    found = Moments()
    for value in values:
        found = found.add(value)
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-6)
    assert found.variance_of_mean == pytest.approx(statistics.variance(values) / len(values), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("worse", "found"),
    [
        ({"error_rate": 0.2}, "errors: "),
        ({"seconds": 0.6}, "first token after 0."),
        ({"score": 0.5}, "score 0."),
    ],
)
def test_a_version_that_is_worse_is_taken_back_and_the_measure_named(worse, found):
    assert objection(RULE, tally(1), tally(2, **worse)).startswith(found)


def test_an_equal_or_better_version_stays_nearly_always():
    objections = [objection(RULE, tally(seed), tally(seed + 1000, count=60)) for seed in range(100)]
    assert sum(one is not None for one in objections) <= 2
    assert objection(RULE, tally(1), tally(2, error_rate=0.0, seconds=0.05, score=0.95)) is None


@pytest.mark.parametrize("few", [{"count": 49}, {"count": 0}])
def test_nothing_is_decided_on_few_requests(few):
    bad = {"error_rate": 1.0}
    assert objection(RULE, tally(1), tally(2, **bad, **few)) is None
    assert objection(RULE, tally(1, **few), tally(2, **bad)) is None


@pytest.mark.parametrize(
    ("answered", "lost", "taken_back"),
    [
        (0, 3, True),
        (0, 2, False),  # which chance explains
        (20, 4, True),
        (300, 3, False),  # within what is allowed
        (300, 30, True),
    ],
)
def test_a_version_that_does_not_answer_is_taken_back_after_few_requests(answered, lost, taken_back):
    canary = dataclasses.replace(tally(2, count=answered, error_rate=0.0), lost=lost)
    told = objection(RULE, Tally(), canary)
    assert told == (f"no answer to {lost} of {lost + answered} requests, before to all" if taken_back else None)


def test_a_summary_is_for_people():
    summary = Tally().answered(0.5).answered(0.5).failed().scored(1.0).summary()
    assert summary == {
        "requests": 3,
        "errors": 1,
        "lost": 0,
        "first_token_s": pytest.approx(0.5),
        "scores": 1,
        "score": 1.0,
    }
    assert Tally().summary()["first_token_s"] is None


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_who_is_in_a_share_stays_in_it_while_it_grows(key, one, other):
    small, large = sorted((one, other))
    assert takes_canary(key, small) <= takes_canary(key, large)
    assert not takes_canary(key, 0.0) and takes_canary(key, 1.0)


def test_shares_are_met():
    assert sum(takes_canary(f"key {index}", 0.1) for index in range(10_000)) == pytest.approx(1000, abs=120)
