"""The rule that switches speculation on and off, in plain Python."""

from __future__ import annotations

from itertools import pairwise

import pytest

from lmray.engines._payoff import (
    FIRST_REST,
    MAX_REST,
    PLAIN_STEPS,
    REFRESH,
    TRIAL_TOKENS,
    Chance,
    Payoff,
    num_worthwhile,
)


@pytest.mark.parametrize(
    ("chance", "cost_s", "saved_s", "count"),
    [
        (0.9, 0.0, 1.0, 8),
        (0.5, 0.2, 1.0, 2),  # 0.5 and 0.25 pay, 0.125 does not
        (0.5, 0.5, 1.0, 0),
        (1.0, 0.99, 1.0, 8),
        (1.0, 1.01, 1.0, 0),
        (0.0, 0.0, 1.0, 0),
    ],
)
def test_a_proposed_token_pays_where_its_chance_of_what_it_saves_is_above_what_it_costs(chance, cost_s, saved_s, count):
    assert num_worthwhile(chance, cost_s, saved_s, 8) == count


def test_a_chance_is_of_places_that_were_tried_and_the_newest_count_most():
    chance = Chance()
    assert chance.share(0.3) == pytest.approx(0.3)
    chance.note(4, 0)  # one wrong token, and three behind it that tell nothing
    assert chance.share(0.5) == pytest.approx(1 / 3)
    for _ in range(50):
        chance.note(4, 4)
    assert chance.share(0.5) > 0.95
    for _ in range(6):
        chance.note(4, 0)
    assert chance.share(0.5) < 0.6


def ran(payoff: Payoff, chances: list[Chance], num_steps: int, *, right: float, cost_s: float) -> list[int]:
    """Tokens proposed in each step; a step takes 1 s and `cost_s` for each of them, of which the first share `right`
    holds."""
    told = []
    for _ in range(num_steps):
        counts = payoff.num_tokens(len(chances), chances, 8)
        accepted = [int(count * right) for count in counts]
        for chance, count, number in zip(chances, counts, accepted, strict=True):
            if count:
                payoff.verified(chance, count, number)
        seconds = 1.0 + cost_s * sum(counts)
        payoff.took(len(chances), seconds, num_proposed=sum(counts), num_generated=len(chances) + sum(accepted))
        told.append(sum(counts))
    return told


def test_what_is_right_and_cheap_is_proposed_in_full():
    payoff = Payoff()
    told = ran(payoff, [Chance()], 50, right=1.0, cost_s=0.01)
    assert told[:PLAIN_STEPS] == [0] * PLAIN_STEPS, "the first steps are timed without"
    assert told[10:] == [8] * 40
    assert payoff.active
    assert payoff.gain == pytest.approx(9 / 1.08, rel=0.02)


def test_what_is_wrong_is_given_up_and_tried_again_more_and_more_seldom():
    payoff = Payoff()
    told = ran(payoff, [Chance()], 2000, right=0.0, cost_s=0.1)
    assert not payoff.active
    tried = [step for step, count in enumerate(told) if count and step > 50]
    assert {told[step] for step in tried} == {TRIAL_TOKENS}
    waits = [after - before for before, after in pairwise(tried)]
    assert waits == sorted(waits) and waits[-1] == MAX_REST + 1
    assert payoff.gain is not None and payoff.gain < 1.0


def test_what_becomes_right_again_is_taken_up_again():
    payoff, chances = Payoff(), [Chance()]
    ran(payoff, chances, 300, right=0.0, cost_s=0.05)
    assert not payoff.active
    ran(payoff, chances, 2 * MAX_REST, right=1.0, cost_s=0.05)
    assert payoff.active
    assert chances[0].rest == FIRST_REST


def test_what_costs_more_than_it_saves_is_given_up_however_right_it_is():
    payoff = Payoff()
    told = ran(payoff, [Chance() for _ in range(4)], 100, right=1.0, cost_s=0.3)  # a token saves 0.25 s here
    assert not payoff.active
    assert sum(told[50:]) < 50
    assert payoff.num_accepted == payoff.num_proposed > 0


def test_a_row_is_given_up_alone():
    payoff, good, bad = Payoff(), Chance(), Chance()
    for _ in range(30):
        counts = payoff.num_tokens(2, [good, bad], 4)
        payoff.verified(good, counts[0], counts[0]) if counts[0] else None
        payoff.verified(bad, counts[1], 0) if counts[1] else None
        payoff.took(2, 1.0 + 0.1 * sum(counts), num_proposed=sum(counts), num_generated=2 + counts[0])
    assert payoff.num_tokens(2, [good, bad], 4)[0] == 4
    assert bad.share(0.5) < 0.25 < 0.9 < good.share(0.5)


def test_each_number_of_rows_has_times_of_its_own_and_they_are_taken_again():
    payoff, chances = Payoff(), [Chance()]
    told = ran(payoff, chances, REFRESH + 10, right=1.0, cost_s=0.0)
    assert [step for step, count in enumerate(told) if not count] == [0, 1, 2, REFRESH + 3]
    assert payoff.num_tokens(2, [Chance(), Chance()], 4) == [0, 0]
