"""Requests find the replicas that hold their adapter, and leave them where those have too much to do."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmray.policies.placement import PREFIX, key_of, ranked

LOADS = st.dictionaries(st.text(min_size=1, max_size=4), st.integers(0, 50), min_size=1, max_size=8)


@given(st.text(), LOADS)
def test_every_replica_is_tried_once_and_the_first_is_not_overloaded(key, loads):
    order = ranked(key, loads)
    assert sorted(order) == sorted(loads)
    assert loads[order[0]] <= 1.25 * (sum(loads.values()) + 1) / len(loads)


@given(st.text(), st.sets(st.text(min_size=1, max_size=4), min_size=2, max_size=8), st.data())
def test_a_replica_that_goes_moves_only_its_own_adapters(key, replicas, data):
    idle = dict.fromkeys(replicas, 0)
    before = ranked(key, idle)
    gone = data.draw(st.sampled_from(sorted(replicas)))
    del idle[gone]
    assert ranked(key, idle) == [replica for replica in before if replica != gone]


def test_adapters_spread_over_the_replicas():
    idle = dict.fromkeys("abcd", 0)
    firsts = Counter(ranked(f"adapter-{index}", idle)[0] for index in range(1000))
    assert min(firsts.values()) > 200


def test_a_hot_adapter_uses_as_many_replicas_as_it_needs_and_cold_ones_stay():
    loads = dict.fromkeys("abcd", 0)
    for index in range(64):
        loads[ranked("hot" if index % 5 else f"cold-{index}", loads)[0]] += 1
    assert max(loads.values()) <= 1.25 * 64 / 4 + 1 and min(loads.values()) > 0


@pytest.mark.parametrize(("load", "stays"), [(0, True), (3, True), (4, False)])
def test_with_little_to_do_an_adapter_stays_where_it_is(load, stays):
    loads = dict.fromkeys("abcd", 0)
    home = ranked("adapter", loads)[0]
    loads[home] = load
    assert (ranked("adapter", loads, light=4)[0] == home) is stays


def test_where_all_have_much_to_do_the_least_loaded_of_the_rest_comes_next():
    assert ranked("key", {"a": 100, "b": 0, "c": 90})[1:] == ["c", "a"]


def test_requests_meet_by_adapter_else_by_how_their_prompts_begin_and_who_may_share_it():
    system = tuple(range(PREFIX))
    asked = [key_of(None, (*system, *question), "") for question in ((1,), (2, 3))]
    assert asked[0] == asked[1] != key_of(None, (*system, 1), "another tenant")
    assert key_of(None, (*system[:-1], 7), "") != asked[0] and key_of(None, (1,), "") != key_of(None, (2,), "")
    assert key_of(None, (1, 23), "") != key_of(None, (12, 3), "")
    assert key_of("helper@1", (1,), "") == key_of("helper@1", (2,), "another") == "helper@1"


def test_prompts_that_begin_alike_go_to_one_replica_until_it_has_too_much_to_do():
    loads = dict.fromkeys("abcd", 0)
    key = key_of(None, range(1000), "")
    for _ in range(8):
        loads[ranked(key, loads, light=8)[0]] += 1
    assert sorted(loads.values()) == [0, 0, 0, 8]
    for _ in range(56):
        loads[ranked(key, loads, light=8)[0]] += 1
    assert max(loads.values()) <= 1.25 * 64 / 4 + 1 and min(loads.values()) > 0
