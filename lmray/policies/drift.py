"""Whether the answers of a model are still what they were: a window of scored answers against a baseline window.

Measures that are numbers are compared by the two-sample Kolmogorov-Smirnov statistic, the largest distance between two
empirical distribution functions. It says drift beyond `sqrt((1 + ln(1/a)) / 2 * (n + m) / (n * m))`, which equal
distributions pass with a probability of at most `a`: the inequality of Dvoretzky, Kiefer and Wolfowitz for two samples,
whose constant is at most e (Wei, Dudley, "Two-sample Dvoretzky-Kiefer-Wolfowitz inequalities", Statistics and
Probability Letters 82, 2012). It supposes nothing of the distributions; ties make it more careful. Measures that are
yes or no are compared by Fisher's exact test (1922), its smaller tail doubled. `a` is the window's share of false
alarms divided by its measures (Bonferroni), and windows do not overlap: with answers of one distribution a window
raises an alarm with a probability of at most `false_alarms`. Standard library only; everything here is a value.
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
        chance = fisher(round(sum(before)), len(before), round(sum(now)), len(now))
        distance = math.log(chance) / math.log(level)
    else:
        distance = kolmogorov_smirnov(before, now) / limit(len(before), len(now), level)
    return Difference(distance, sum(before) / len(before), sum(now) / len(now))


def kolmogorov_smirnov(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest distance between the empirical distribution functions of two samples."""
    first, second = sorted(a), sorted(b)
    places = {*first, *second}
    return max(abs(bisect_right(first, x) / len(first) - bisect_right(second, x) / len(second)) for x in places)


def limit(n: int, m: int, level: float) -> float:
    """What `kolmogorov_smirnov` of samples of `n` and `m` exceeds with a probability of at most `level` by chance."""
    return math.sqrt((1.0 + math.log(1.0 / level)) / 2.0 * (n + m) / (n * m))


def fisher(hits_a: int, n: int, hits_b: int, m: int) -> float:
    """Probability that chance alone divides all hits between two samples at least so unevenly, either way; at most
    1."""
    hits, ways = hits_a + hits_b, math.comb(n + m, hits_a + hits_b)
    fewest, most = max(0, hits - m), min(n, hits)

    def tail(counts: range) -> float:
        return sum(math.comb(n, count) * math.comb(m, hits - count) for count in counts) / ways

    return min(1.0, 2.0 * min(tail(range(fewest, hits_a + 1)), tail(range(hits_a, most + 1))))
