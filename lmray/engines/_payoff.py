"""Whether proposed tokens pay: what verifying one costs against the chance that it is right. Plain Python.

A step reads a token of each row and, where tokens are proposed, these too. The j-th token proposed to a row is of use
where all before it are right as well, which has the chance p^j (Leviathan et al., arXiv 2211.17192, section 3.2, take
p as the same everywhere). It then saves the time that a token takes otherwise; it costs what it adds to the step.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from statistics import median

FIRST_CHANCE = 0.5
"""Of a proposed token, while nothing is known."""
PRIOR = 2.0
"""How many tokens the chance of all sequences counts for in that of one."""
DECAY, SLOW_DECAY = 0.8, 0.99
"""What tells less with each verification: of one sequence's chance, of what is known about all."""
FIRST_REST, MAX_REST = 16, 256
"""Steps without proposals after which a sequence is tried again; doubled while that fails."""
TRIAL_TOKENS = 2
MEMORY = 9
"""Steps whose times are remembered for each number of rows."""
PLAIN_STEPS = 3
"""So many steps without proposals are timed first: the first of all may be slower than any that follows."""
REFRESH = 64
"""A step without proposals is timed again after so many steps with some."""


@dataclass
class Chance:
    """How often proposed tokens are right, the newest counting most."""

    hits: float = 0.0
    tries: float = 0.0
    rest: int = FIRST_REST
    idle: int = 0
    """Steps since tokens were last proposed."""

    def note(self, num_proposed: int, num_accepted: int, decay: float = DECAY) -> None:
        """Of the tokens proposed, the first `num_accepted` were right; those behind a wrong one tell nothing."""
        self.hits = decay * self.hits + num_accepted
        self.tries = decay * self.tries + num_accepted + (num_accepted < num_proposed)
        self.rest = FIRST_REST if num_accepted else min(2 * self.rest, MAX_REST)
        self.idle = 0

    def share(self, prior: float) -> float:
        """The chance that the next token is right; `prior`, where this one knows nothing."""
        return (self.hits + PRIOR * prior) / (self.tries + PRIOR)


def num_worthwhile(chance: float, cost_s: float, saved_s: float, limit: int) -> int:
    """How many proposed tokens pay, up to `limit`, where each is right with `chance`, takes `cost_s` to verify and
    saves `saved_s` if it is right."""
    count = 0
    while count < limit and chance ** (count + 1) * saved_s > cost_s:
        count += 1
    return count


class Payoff:
    """What steps took, by their number of rows, and what became of proposals."""

    def __init__(self) -> None:
        self.overall = Chance(PRIOR * FIRST_CHANCE, PRIOR)
        self.num_proposed = self.num_accepted = 0
        self.active = False
        """Whether proposals were worth it in the last step that could have had some."""
        self._plain_s: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=MEMORY))
        self._cost_s: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=MEMORY))
        self._age: defaultdict[int, int] = defaultdict(int)
        self._would_s = self._took_s = 0.0

    def num_tokens(self, num_rows: int, chances: list[Chance], limit: int) -> list[int]:
        """How many tokens to propose to each row of a step, up to `limit`."""
        if len(self._plain_s[num_rows]) < PLAIN_STEPS or self._age[num_rows] >= REFRESH:
            return [0] * len(chances)  # a step without proposals, to be timed
        cost_s = max(0.0, median(self._cost_s[num_rows])) if self._cost_s[num_rows] else 0.0
        saved_s = median(self._plain_s[num_rows]) / num_rows
        prior = self.overall.share(FIRST_CHANCE)
        counts = [num_worthwhile(one.share(prior), cost_s, saved_s, limit) for one in chances]
        self.active = any(counts)
        for place, chance in enumerate(chances):
            chance.idle += 1
            if not counts[place] and chance.idle > chance.rest:
                counts[place] = min(TRIAL_TOKENS, limit)
        return counts

    def verified(self, chance: Chance, num_proposed: int, num_accepted: int) -> None:
        """What became of the tokens proposed to one row."""
        self.num_proposed += num_proposed
        self.num_accepted += num_accepted
        chance.note(num_proposed, num_accepted)
        self.overall.note(num_proposed, num_accepted, SLOW_DECAY)

    def took(self, num_rows: int, seconds: float, *, num_proposed: int, num_generated: int) -> None:
        """A step of rows that all generate took `seconds`, proposals included."""
        if not num_proposed:
            self._plain_s[num_rows].append(seconds)
            self._age[num_rows] = 0
        elif self._plain_s[num_rows]:
            plain_s = median(self._plain_s[num_rows])
            self._cost_s[num_rows].append((seconds - plain_s) / num_proposed)
            self._age[num_rows] += 1
            self._would_s = SLOW_DECAY * self._would_s + num_generated * plain_s / num_rows
            self._took_s = SLOW_DECAY * self._took_s + seconds

    @property
    def gain(self) -> float | None:
        """How many times faster tokens came in the last steps with proposals than in steps without; None before any."""
        return self._would_s / self._took_s if self._took_s else None
