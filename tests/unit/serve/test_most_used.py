"""Which names keep a place of their own."""

from __future__ import annotations

import random

from lmray.serve import most_used
from lmray.serve.most_used import MostUsed


def test_the_first_names_have_places_and_later_ones_only_where_they_are_used_clearly_more():
    dropped = []
    most: MostUsed[str] = MostUsed(2, dropped.append)
    assert [most.use(name) for name in "aabb"] == [True] * 4
    assert [most.use("c") for _ in range(4)] == [False] * 4
    assert dropped == []
    assert most.use("c") and dropped == ["a"]
    assert [most.use(name) for name in "cba"] == [True, True, False]
    assert [name in most for name in "abc"] == [False, True, True]


def test_names_that_are_used_alike_do_not_take_turns():
    dropped = []
    most: MostUsed[int] = MostUsed(10, dropped.append)
    source = random.Random(0)
    for _ in range(20_000):
        most.use(source.randrange(100))
    assert len(dropped) < 30, "only while little is known"


def test_what_is_used_no_more_is_forgotten_and_its_place_taken(monkeypatch):
    monkeypatch.setattr(most_used, "FORGET_EVERY", 10)
    dropped = []
    most: MostUsed[str] = MostUsed(1, dropped.append)
    for _ in range(40):
        most.use("old")
    taken = [most.use("new") for _ in range(40)]
    assert taken.index(True) < 20 and taken[-1] and dropped == ["old"]
    assert set(most._uses) == {"new"} or most._uses["old"] == 0


def test_memory_is_bounded_by_what_was_used_lately(monkeypatch):
    monkeypatch.setattr(most_used, "FORGET_EVERY", 100)
    most: MostUsed[int] = MostUsed(5, lambda name: None)
    for name in range(10_000):
        most.use(name)
    assert len(most._uses) <= 110
