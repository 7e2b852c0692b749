"""Whether the answers of a model are still what they were: a window of scored answers against a baseline window.

Measures that are numbers are compared by the two-sample Kolmogorov-Smirnov statistic, the largest distance between two
empirical distribution functions. It says drift from `sqrt((1 + ln(1/a)) / 2 * (n + m) / (n * m))` on, which equal
distributions reach with a probability of at most `a`: the inequality of Dvoretzky, Kiefer and Wolfowitz for two
samples, with the constant e (Wei, Dudley, "Two-sample Dvoretzky-Kiefer-Wolfowitz inequalities", Statistics and
Probability Letters 82, 2012). For samples of one size they prove e for every size, and 2 from 458 on; for unequal
sizes, as where some answers lack a measure, they found 2 to hold by computer from 4 to 200 and suppose it beyond. It
supposes nothing of the distributions; ties make it more careful. Measures that are yes or no are compared by Fisher's
exact test (1922), its smaller tail doubled. `a` is the window's share of false alarms divided by its measures
(Bonferroni), and windows do not overlap: with answers of one distribution a window raises an alarm with a probability
of at most `false_alarms`. Standard library only; everything here is a value.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Values = Mapping[str, Sequence[float]]
"""What was measured, by measure; 0 and 1 where a measure is yes or no."""
FEWEST = 10
"""Values on both sides below which a measure is not compared."""


@dataclass(frozen=True)
class Difference:
    """One measure, before and now."""

    distance: float
    """1 and more is drift: the statistic over its limit, for yes and no ln p over ln a."""
    before: float
    """Mean in the baseline."""
    now: float

    @property
    def drifted(self) -> bool:
        return self.distance >= 1.0


def compare(baseline: Values, window: Values, *, false_alarms: float) -> dict[str, Difference]:
    """The measures that both have `FEWEST` values of or more. `false_alarms`: as above, above 0 and below 1."""
    shared = {name for name in baseline if min(len(baseline[name]), len(window.get(name, ()))) >= FEWEST}
    level = false_alarms / max(len(shared), 1)
    return {name: _difference(baseline[name], window[name], level) for name in baseline if name in shared}


def _difference(before: Sequence[float], now: Sequence[float], level: float) -> Difference:
    if set(before) | set(now) <= {0.0, 1.0}:
        distance = log_fisher(round(sum(before)), len(before), round(sum(now)), len(now)) / math.log(level)
    else:
        distance = kolmogorov_smirnov(before, now) / limit(len(before), len(now), level)
    return Difference(distance, sum(before) / len(before), sum(now) / len(now))


def kolmogorov_smirnov(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest distance between the empirical distribution functions of two samples."""
    first, second = sorted(a), sorted(b)
    places = {*first, *second}
    return max(abs(bisect_right(first, x) / len(first) - bisect_right(second, x) / len(second)) for x in places)


def limit(n: int, m: int, level: float) -> float:
    """What `kolmogorov_smirnov` of samples of `n` and `m` reaches with a probability of at most `level` by chance."""
    return math.sqrt((1.0 + math.log(1.0 / level)) / 2.0 * (n + m) / (n * m))


def log_fisher(hits_a: int, n: int, hits_b: int, m: int) -> float:
    """Natural logarithm of the probability that chance alone divides all hits between two samples at least so unevenly,
    either way; at most 0. The probability itself may be less than a float can be."""
    hits = hits_a + hits_b
    fewest, most, ways = max(0, hits - m), min(n, hits), _log_comb(n + m, hits)

    def log_tail(counts: range) -> float:
        logs = [_log_comb(n, count) + _log_comb(m, hits - count) - ways for count in counts]
        return (peak := max(logs)) + math.log(sum(math.exp(one - peak) for one in logs))

    return min(0.0, math.log(2.0) + min(log_tail(range(fewest, hits_a + 1)), log_tail(range(hits_a, most + 1))))


def _log_comb(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
