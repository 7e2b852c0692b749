"""Rows as a state machine, without a model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmray.engines._slots import Move, Row, Slots
from lmray.engines.base import Request, Sampling, TokenEvent

STOP = frozenset({2})


def request(name: str, *, max_tokens: int = 8, num_tokens: int = 4, adapter: str | None = None) -> Request:
    return Request(name, (5,) * num_tokens, Sampling(max_tokens), adapter)


def names(slots: Slots) -> list[str]:
    return [row.request.id for row in slots.running]


def test_requests_get_rows_in_the_order_they_came_and_wait_while_all_are_taken():
    slots = Slots(max_rows=2, max_length=32)
    for name in "abc":
        slots.add(request(name))
    assert [row.request.id for row in iter(slots.admit, None)] == ["a", "b"]
    assert names(slots) == ["a", "b"]
    assert [waiting.id for waiting in slots.waiting] == ["c"]


def test_the_last_row_moves_into_the_place_of_one_that_ends():
    slots = Slots(max_rows=3, max_length=32)
    for name in "abc":
        slots.add(request(name))
        slots.admit()
    assert slots.release(0) == Move(source=2, target=0)
    assert names(slots) == ["c", "b"]
    assert slots.release(1) is None
    assert names(slots) == ["c"]


def test_a_stop_token_ends_a_row_and_is_not_sent():
    row = Row(request("a"), max_length=32, length=4)
    assert row.take(7, STOP) == TokenEvent("a", 7, None)
    assert row.take(2, STOP) == TokenEvent("a", None, "stop")
    assert row.num_generated == 1


def test_a_row_ends_with_its_last_token_at_max_tokens():
    row = Row(request("a", max_tokens=2), max_length=32, length=4)
    assert row.take(7, STOP).finish_reason is None
    assert row.take(7, STOP) == TokenEvent("a", 7, "length")


def test_a_row_ends_where_prompt_and_answer_fill_max_length():
    row = Row(request("a", max_tokens=99), max_length=6, length=4)
    assert row.take(7, STOP).finish_reason is None
    row.length = 5
    assert row.take(7, STOP).finish_reason == "length"


def test_equal_seeds_give_equal_draws_and_none_gives_others():
    def draws(seed: int | None) -> list[float]:
        slots = Slots(max_rows=1, max_length=32)
        slots.add(Request("a", (5,), Sampling(8, temperature=1.0, seed=seed)))
        row = slots.admit()
        assert row is not None
        return [row.chooser.random.random() for _ in range(4)]

    assert draws(3) == draws(3)
    assert draws(None) != draws(None)


def test_waiting_requests_can_be_dropped_and_adapters_in_use_are_known():
    slots = Slots(max_rows=1, max_length=32)
    slots.add(request("a", adapter="x"))
    slots.add(request("b", adapter="y"))
    slots.admit()
    assert slots.adapters_in_use() == {"x", "y"}
    assert slots.drop_waiting("b")
    assert not slots.drop_waiting("a"), "it runs, so it does not wait"
    assert slots.adapters_in_use() == {"x"}
    assert slots.clear() == ["a"]
    assert not slots.busy


@given(st.lists(st.integers(min_value=-1, max_value=3), max_size=60))
def test_rows_stay_dense_and_nothing_is_lost(steps: list[int]):
    """-1 adds and admits; a number ends that row, where there is one."""
    slots, kept, places = Slots(max_rows=3, max_length=32), set(), {}
    for number, step in enumerate(steps):
        if step < 0:
            slots.add(request(str(number)))
            kept.add(str(number))
            while (row := slots.admit()) is not None:
                places[row.request.id] = len(slots.running) - 1
        elif step < len(slots.running):
            ended = names(slots)[step]
            move = slots.release(step)
            kept.discard(ended)
            del places[ended]
            if move is not None:
                places[next(name for name, place in places.items() if place == move.source)] = move.target
        assert len(slots.running) <= 3
        assert places == {name: place for place, name in enumerate(names(slots))}
        assert kept == set(names(slots)) | {waiting.id for waiting in slots.waiting}
