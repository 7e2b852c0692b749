"""When a new version of an adapter is taken back: its share of the traffic is compared with what the rest sees.

Each measure is a mean over requests with its standard error; a version is taken back once a measure is worse than
allowed by more than chance explains (one-sided, 95 %). It is asked after every request, so over a long time chance gets
more tries than one: what is allowed is the margin for that. Standard library only; everything here is a value.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field, replace

Z_95 = 1.645
"""One-sided quantile of the normal distribution."""
PRIOR = 2.0
"""Failures and successes added to those seen, so that few requests do not look certain (Agresti, Coull 1998)."""
MIN_LOST = 3
"""Requests that get no answer, before a version is taken back for that; each may have ended the replicas it met."""


@dataclass(frozen=True)
class Rule:
    """What is allowed."""

    min_requests: int = 50
    """Of each version, before anything is decided."""
    max_error_increase: float = 0.02
    """How much larger the share of failed requests may be."""
    max_latency_increase: float = 0.5
    """How much larger, as a fraction, the time to the first token may be (geometric mean)."""
    max_score_drop: float = 0.05
    """How much lower the mean score may be."""


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of a measure."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> Moments:
        return Moments(self.count + 1, self.total + value, self.squares + value * value)

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def variance_of_mean(self) -> float:
        spread = max(self.squares / self.count - self.mean**2, 0.0)
        return spread / max(self.count - 1, 1)


@dataclass(frozen=True)
class Tally:
    """What was seen of one version."""

    requests: int = 0
    errors: int = 0
    lost: int = 0
    """Requests, of none of the above, that no replica answered and the version before did."""
    log_first_token_s: Moments = field(default_factory=Moments)
    scores: Moments = field(default_factory=Moments)

    def answered(self, first_token_s: float) -> Tally:
        """With one more request, whose first token took that long."""
        moments = self.log_first_token_s.add(math.log(max(first_token_s, 1e-6)))
        return replace(self, requests=self.requests + 1, log_first_token_s=moments)

    def failed(self, *, answered: bool = False) -> Tally:
        """With one more failure; `answered`: of a request that was counted when its first token came."""
        return replace(self, requests=self.requests + (not answered), errors=self.errors + 1)

    def lost_one(self) -> Tally:
        """With one more request that only the version before answered."""
        return replace(self, lost=self.lost + 1)

    def scored(self, score: float) -> Tally:
        return replace(self, scores=self.scores.add(score))

    def summary(self) -> dict[str, float | int | None]:
        """For people: counts, seconds, means."""
        latency, scores = self.log_first_token_s, self.scores
        return {
            "requests": self.requests,
            "errors": self.errors,
            "lost": self.lost,
            "first_token_s": math.exp(latency.mean) if latency.count else None,
            "scores": scores.count,
            "score": scores.mean if scores.count else None,
        }


def takes_canary(key: str, share: float) -> bool:
    """Whether requests with `key` go to the new version: the same for equal keys, and who is in a share is in every
    larger one."""
    drawn = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return drawn < share * 2**64


def objection(rule: Rule, current: Tally, canary: Tally) -> str | None:
    """Why the new version is to be taken back; None while nothing speaks against it."""
    tried = canary.requests + canary.lost
    if canary.lost >= MIN_LOST and _exceeds(*_smoothed_rate(canary.lost, tried), rule.max_error_increase):
        return f"no answer to {_of(canary.lost, tried)} requests, before to all"
    if min(current.requests, canary.requests) >= rule.min_requests:
        counts = (current.errors, current.requests), (canary.errors, canary.requests)
        if _more_often(*counts, rule.max_error_increase):
            return f"errors: {_of(*counts[1])} requests, before {_of(*counts[0])}"
    now, new = current.log_first_token_s, canary.log_first_token_s
    if min(now.count, new.count) >= rule.min_requests:
        variance = now.variance_of_mean + new.variance_of_mean
        if _exceeds(new.mean - now.mean, variance, math.log1p(rule.max_latency_increase)):
            return f"first token after {math.exp(new.mean):.3f} s, before {math.exp(now.mean):.3f} s"
    now, new = current.scores, canary.scores
    if min(now.count, new.count) >= rule.min_requests:
        variance = now.variance_of_mean + new.variance_of_mean
        if _exceeds(now.mean - new.mean, variance, rule.max_score_drop):
            return f"score {new.mean:.3f}, before {now.mean:.3f}"
    return None


def _of(some: int, every: int) -> str:
    return f"{some} of {every}"


def _more_often(current: tuple[int, int], canary: tuple[int, int], allowed: float) -> bool:
    """Whether the share of failures among requests has grown by more than `allowed`."""
    (now, now_variance), (new, new_variance) = _smoothed_rate(*current), _smoothed_rate(*canary)
    return _exceeds(new - now, new_variance + now_variance, allowed)


def _smoothed_rate(failures: int, requests: int) -> tuple[float, float]:
    """The share of failures, and the variance of that."""
    count = requests + 2 * PRIOR
    rate = (failures + PRIOR) / count
    return rate, rate * (1.0 - rate) / count


def _exceeds(difference: float, variance: float, allowed: float) -> bool:
    return difference - Z_95 * math.sqrt(variance) > allowed
