"""Drift of answers: what is compared, with what statistic, and how often chance alone raises an alarm."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from scipy import stats

from lmray.policies.drift import FEWEST, compare, kolmogorov_smirnov, limit, log_fisher


def answers(source: random.Random, count: int, *, length: float = 40.0, refusal: float = 0.03, loss: float = 2.0):
    """Scores of `count` answers: lengths skewed and whole as real ones are."""
    return {
        "length": [float(round(source.lognormvariate(math.log(length), 0.6))) for _ in range(count)],
        "refusal": [float(source.random() < refusal) for _ in range(count)],
        "loss": [source.gauss(loss, 0.5) for _ in range(count)],
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_statistics_are_scipys(seed):
    source = random.Random(seed)
    a, b = ([float(source.randrange(12)) for _ in range(count)] for count in (37, 60))
    expected: Any = stats.ks_2samp(a, b)
    assert kolmogorov_smirnov(a, b) == pytest.approx(expected.statistic, abs=1e-12)
    hits_a, hits_b = source.randrange(37), source.randrange(60)
    table = [[hits_a, 37 - hits_a], [hits_b, 60 - hits_b]]
    one_sided = [float(stats.fisher_exact(table, alternative=side).pvalue) for side in ("less", "greater")]  # type: ignore[attr-defined]
    assert math.exp(log_fisher(hits_a, 37, hits_b, 60)) == pytest.approx(min(1.0, 2 * min(one_sided)), rel=1e-6)


def test_the_limit_is_what_the_inequality_says_and_lies_above_the_exact_quantile():
    assert limit(100, 100, 0.01) == pytest.approx(math.sqrt((1 + math.log(100)) / 100))
    for n in (20, 50, 200):
        for level in (0.05, 0.01, 0.001):
            place = limit(n, n, level)
            shift = math.ceil(place * n)  # samples of numbers 0..n-1 and shifted ones have this distance
            shifted: Any = stats.ks_2samp(range(n), [one + shift + 0.5 for one in range(n)], method="exact")
            assert shifted.pvalue <= level


def chances(n: int) -> list[float]:
    """Probability that two samples of `n` of one distribution are `d / n` apart or more, by d from 1 on: by reflection
    of the paths that count one sample up and the other down."""
    ways = math.comb(2 * n, n)
    far = [
        [(-1) ** (turn + 1) * math.comb(2 * n, n + turn * d) for turn in range(1, n // d + 1)] for d in range(1, n + 1)
    ]
    return [2 * sum(one) / ways for one in far]


def constant(n: int) -> float:
    """Least C with which `C exp(-2 M^2)` bounds the chance that sqrt(n / 2) times the distance is M or more."""
    return max(chance * math.exp(d * d / n) for d, chance in enumerate(chances(n), start=1))


def test_the_constants_are_wei_and_dudleys():
    """Theorem 1 of Wei and Dudley: e for all n, which 1 needs, and 2 from 458 on."""
    assert constant(1) == pytest.approx(math.e)
    assert all(constant(n) < math.e for n in (2, 3, 5, 10, 20, 50, 100, 200))
    assert constant(457) > 2.0 >= constant(458)


@pytest.mark.parametrize("sizes", [(10, 11), (10, 200), (57, 100), (150, 200), (200, 400)], ids=str)
def test_the_limit_is_kept_where_some_answers_lack_a_measure(sizes):
    n, m = sizes
    for level in (0.5, 0.05, 0.001):
        shift = math.ceil(limit(n, m, level) * n)  # that share of the first sample lies below all of the second
        a = [*range(-shift, 0), *([m + 1.0] * (n - shift))]
        found: Any = stats.ks_2samp(a, range(m), method="exact")
        assert found.statistic >= limit(n, m, level) and found.pvalue <= level


@pytest.mark.parametrize("seed", range(3))
def test_answers_of_one_distribution_raise_no_more_alarms_than_allowed(seed):
    source, num_windows, allowed = random.Random(seed), 300, 0.05
    alarms = 0
    for _ in range(num_windows):
        found = compare(answers(source, 100), answers(source, 100), false_alarms=allowed)
        assert set(found) == {"length", "refusal", "loss"}
        alarms += any(one.drifted for one in found.values())
    assert alarms <= allowed * num_windows


@pytest.mark.parametrize(
    ("change", "measure"),
    [({"length": 80.0}, "length"), ({"refusal": 0.4}, "refusal"), ({"loss": 2.8}, "loss"), ({"loss": 1.2}, "loss")],
    ids=str,
)
def test_a_change_of_one_measure_is_seen_and_named(change, measure):
    for seed in range(20):
        source = random.Random(seed)
        found = compare(answers(source, 100), answers(source, 100, **change), false_alarms=0.001)
        assert [name for name, one in found.items() if one.drifted] == [measure]


@pytest.mark.parametrize("num", [100, 2000, 10_000])
def test_the_more_refusals_the_further_though_chance_is_less_than_a_float(num):
    source = random.Random(num)
    before = {"refusal": [float(source.random() < 0.03) for _ in range(num)]}
    found = compare(before, {"refusal": [1.0] * num}, false_alarms=0.001)["refusal"]
    assert found.drifted and found.now == 1.0
    most = compare({"refusal": [0.0] * num}, {"refusal": [1.0] * num}, false_alarms=0.001)["refusal"]
    exact = (math.log(2.0) - math.log(math.comb(2 * num, num))) / math.log(0.001)  # of integers, however large
    assert most.distance == pytest.approx(exact, rel=1e-9) and most.distance > found.distance


def test_refusals_that_end_are_drift_too():
    before, now = {"refusal": [1.0] * 30 + [0.0] * 70}, {"refusal": [0.0] * 100}
    found = compare(before, now, false_alarms=0.001)["refusal"]
    assert found.drifted and (found.before, found.now) == (0.3, 0.0)


def test_a_measure_with_few_values_is_not_compared_and_takes_no_share_of_the_alarms():
    many, few = (
        {"length": [1.0, 2.0] * 50, "loss": [1.0] * (FEWEST - 1)},
        {"length": [1.0, 2.0] * 50, "loss": [9.0] * 100},
    )
    assert set(compare(many, few, false_alarms=0.01)) == {"length"}
    alone = compare({"length": many["length"]}, {"length": [1.0, 3.0] * 50}, false_alarms=0.01)
    assert compare(many, {**few, "length": [1.0, 3.0] * 50}, false_alarms=0.01) == alone
    assert compare({}, {}, false_alarms=0.01) == {}


def test_equal_answers_are_at_no_distance():
    found = compare({"length": [5.0] * 50}, {"length": [5.0] * 50}, false_alarms=0.001)
    assert found["length"].distance == 0.0
    none = compare({"refusal": [0.0] * 50}, {"refusal": [0.0] * 50}, false_alarms=0.001)
    assert none["refusal"].distance == 0.0
