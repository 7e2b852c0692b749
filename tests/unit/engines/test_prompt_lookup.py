"""What prompt lookup proposes: tokens and places alone, without a model."""

from __future__ import annotations

import random

from lmray.engines._speculation.prompt_lookup import _Places


def after(tokens: list[int], num: int = 4, sizes: range = range(3, 1, -1)) -> list[int]:
    return _Places(sizes).after(tokens, num)


def test_what_followed_the_last_tokens_before_is_proposed():
    assert after([1, 2, 3, 4, 5, 6, 7, 1, 2, 3]) == [4, 5, 6, 7]
    assert after([1, 2, 3, 4, 9, 2, 3]) == [4, 9, 2, 3], "two tokens, where three never stood there"
    assert after([1, 2, 3, 8, 2, 3, 9, 1, 2, 3]) == [8, 2, 3, 9], "three tokens say more than the last two"
    assert after([5, 1, 2, 3, 8, 1, 2, 3, 9, 1, 2, 3]) == [9, 1, 2, 3], "the last time counts"
    assert after([7, 1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1], "a loop goes on"
    assert after([4, 4, 4], 3) == [4, 4, 4]
    assert after([1, 2, 3, 4]) == after([3]) == after([]) == []


def test_tokens_that_are_added_one_by_one_are_found_as_if_they_had_always_been_there():
    source = random.Random(0)
    tokens = [source.randrange(3) for _ in range(120)]
    growing = _Places(range(3, 1, -1))
    num_seen = 0
    while num_seen < len(tokens):
        num_seen += source.randrange(1, 4)
        assert growing.after(tokens[:num_seen], 6) == after(tokens[:num_seen], 6)
