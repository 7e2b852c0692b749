"""Blocks and steps as state machines, without a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmray.engines._blocks import BlockPool, block_key
from lmray.engines._schedule import Chunk, Limits, Plan, Scheduler, Sequence
from lmray.engines._slot_space import SlotSpace
from lmray.engines.base import Request, Sampling

SMALL = Limits(max_rows=3, max_length=12, num_blocks=8, block_size=2, max_prefill_tokens=5)
NO_STOP = frozenset({-1})


def request(name: str, tokens: tuple[int, ...] = (5, 6, 7, 8), max_tokens: int = 4) -> Request:
    return Request(name, tokens, Sampling(max_tokens))


def finish(scheduler: Scheduler, plan: Plan, token: int = 9) -> list[str]:
    """The model reads what is planned and draws `token` wherever one can be drawn; the ids it was drawn for."""
    drawn = []
    for chunk in plan.chunks:
        scheduler.done(chunk)
        if chunk.is_last:
            drawn.append(chunk.sequence.request.id)
            if chunk.sequence.take(token, NO_STOP).finish_reason:
                scheduler.end(chunk.sequence)
    return drawn


def guess(scheduler: Scheduler, chunk: Chunk, tokens: list[int]) -> Chunk:
    """`chunk` with as many of `tokens` proposed to follow it as there is room for."""
    if not chunk.generates:
        return chunk
    room, _ = scheduler.make_room(chunk, len(tokens))
    return replace(chunk, proposed=tuple(tokens[:room]))


def verify(chunk: Chunk, tokens: list[int]) -> bool:
    """Draws `tokens`, over and over, as long as they are what was proposed; whether the sequence is done."""
    sequence = chunk.sequence
    for place in range(1 + len(chunk.proposed)):
        token = tokens[place % len(tokens)]
        if sequence.take(token, NO_STOP).finish_reason:
            return True
        if chunk.proposed[place : place + 1] != (token,):
            return False
        sequence.length += 1
    return False


def read(plan: Plan) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.request.id, chunk.start, chunk.end) for chunk in plan.chunks]


def test_a_long_prompt_is_read_in_chunks_while_others_generate():
    scheduler = Scheduler(Limits(max_rows=3, max_length=32, num_blocks=32, block_size=4, max_prefill_tokens=5))
    scheduler.add(request("short", (1, 2, 3)))
    scheduler.add(request("long", tuple(range(10, 22))))
    seen = []
    for _ in range(4):
        plan = scheduler.plan()
        seen.append(read(plan))
        finish(scheduler, plan)
    assert seen == [
        [("short", 0, 3), ("long", 0, 2)],
        [("short", 3, 4), ("long", 2, 7)],
        [("short", 4, 5), ("long", 7, 12)],
        [("short", 5, 6), ("long", 12, 13)],
    ]


def test_a_common_beginning_is_read_once_and_its_last_token_always():
    scheduler = Scheduler(SMALL)
    scheduler.add(request("first", (1, 2, 3, 4)))
    finish(scheduler, scheduler.plan())
    scheduler.add(request("same", (1, 2, 3, 4)))
    scheduler.add(request("longer", (1, 2, 3, 4, 5)))
    plan = scheduler.plan()
    assert read(plan)[1:] == [("same", 2, 4), ("longer", 4, 5)]
    first, same, longer = (sequence.blocks for sequence in scheduler.running)
    assert same[0] == longer[0] == first[0]
    assert same[1] != longer[1] == first[1]
    assert scheduler.num_hit_tokens == 6


def test_sequences_of_another_root_share_nothing():
    scheduler = Scheduler(SMALL)
    scheduler.add(request("base"), b"")
    finish(scheduler, scheduler.plan())
    scheduler.add(request("adapter"), b"a")
    assert read(scheduler.plan())[1:] == [("adapter", 0, 4)]


def test_what_generated_tokens_left_is_found_by_the_next_turn():
    scheduler = Scheduler(SMALL)
    scheduler.add(request("turn", (1, 2), max_tokens=3))
    while scheduler.running or scheduler.waiting:
        finish(scheduler, scheduler.plan())
    scheduler.add(request("next", (1, 2, 9, 9, 9, 4)))
    assert read(scheduler.plan()) == [("next", 4, 6)]


def test_spoiled_blocks_are_found_by_nobody():
    scheduler = Scheduler(SMALL)
    scheduler.add(request("bad"))
    plan = scheduler.plan()
    scheduler.done(plan.chunks[0])
    scheduler.end(plan.chunks[0].sequence, spoiled=True)
    scheduler.add(request("good"))
    assert read(scheduler.plan()) == [("good", 0, 4)]


def test_where_blocks_run_out_the_last_that_came_gives_way_and_goes_on_where_it_was():
    scheduler = Scheduler(Limits(max_rows=2, max_length=8, num_blocks=5, block_size=2, max_prefill_tokens=8))
    scheduler.add(request("old", (1, 2, 3), max_tokens=5))
    scheduler.add(request("young", (4, 5), max_tokens=5))
    order = []
    while scheduler.running or scheduler.waiting:
        order += finish(scheduler, scheduler.plan())
    assert scheduler.num_preempted > 0
    assert Counter(order) == {"old": 5, "young": 5}
    assert order.index("young") < 2, "it ran beside the other before it gave way"
    assert order[-1] == "young"
    assert scheduler.pool.num_free == 5


def generating(*, max_tokens: int = 20, num_blocks: int = 8, max_length: int = 12) -> tuple[Scheduler, Chunk]:
    """A sequence whose three prompt tokens are read, and a first token is drawn; and its next step."""
    scheduler = Scheduler(Limits(2, max_length, num_blocks, block_size=2, max_prefill_tokens=8))
    scheduler.add(request("a", (1, 2, 3), max_tokens))
    finish(scheduler, scheduler.plan())
    [chunk] = scheduler.plan().chunks
    return scheduler, chunk


def test_proposed_tokens_are_read_with_a_sequences_own_and_the_rejected_give_their_blocks_back():
    scheduler, chunk = generating()
    sequence = chunk.sequence
    assert (chunk.start, chunk.end, len(sequence.blocks), scheduler.pool.num_free) == (3, 4, 2, 6)
    chunk = guess(scheduler, chunk, [9, 9, 5, 5, 5])
    assert (chunk.tokens, chunk.num_logits, chunk.stop) == ([9, 9, 9, 5, 5, 5], 6, 9)
    assert (len(sequence.blocks), scheduler.pool.num_free) == (5, 3)
    scheduler.done(chunk)
    assert not verify(chunk, [9])
    scheduler.settle(chunk)
    assert (sequence.tokens, sequence.length) == ([1, 2, 3, 9, 9, 9, 9], 6)
    assert (len(sequence.blocks), scheduler.pool.num_free) == (4, 4)
    assert read(scheduler.plan()) == [("a", 6, 7)]
    scheduler.add(request("b", (1, 2, 3, 9, 9, 9, 5, 5)))
    assert read(scheduler.plan())[1] == ("b", 6, 8), "blocks of accepted tokens are shared, others are not"


def test_nobody_gives_way_for_a_guess_and_no_more_is_guessed_than_may_follow():
    scheduler, chunk = generating(num_blocks=6)
    other = request("other", (5, 5, 5, 5))
    scheduler.add(other)
    assert len(scheduler.plan().chunks) == 2
    assert scheduler.pool.num_free == 2
    assert guess(scheduler, chunk, [7] * 9).proposed == (7,) * 4
    assert [sequence.request.id for sequence in scheduler.running] == ["a", "other"]
    assert scheduler.pool.num_free == 0
    for changes in ({"max_tokens": 3}, {"max_length": 6}):
        scheduler, chunk = generating(**changes)
        assert guess(scheduler, chunk, [7, 7, 7]).proposed == (7,)
    scheduler, chunk = generating(max_tokens=2)
    assert guess(scheduler, chunk, [7]).proposed == ()


def test_idle_blocks_go_before_the_beginning_they_follow():
    pool = BlockPool(3)
    blocks = pool.take(3)
    assert blocks is not None
    keys = [block_key(b"", (1,)), block_key(b"", (2,)), block_key(b"", (3,))]
    for block, key in zip(blocks, keys, strict=True):
        pool.keep(block, key)
    pool.release(blocks)
    assert pool.take(1) == blocks[2:]
    assert pool.find(keys) == blocks[:2]
    assert pool.take(1) is None


class Scheduling(RuleBasedStateMachine):
    """Requests come, are cancelled and end in any order; now and then one is spoiled."""

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(SMALL)
        self.num_added = 0
        self.asked: dict[str, int] = {}
        self.started: list[str] = []

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=11),
        max_tokens=st.integers(1, 12),
        root=st.sampled_from([b"", b"a"]),
    )
    def add(self, prompt, max_tokens, root):
        self.num_added += 1
        name = str(self.num_added)
        self.scheduler.add(request(name, tuple(prompt), max_tokens), root)
        self.asked[name] = min(max_tokens, SMALL.max_length - len(prompt))

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5),
        guesses=st.lists(st.integers(0, 1), max_size=5),
        spoil=st.integers(0, 9),
    )
    def step(self, tokens, guesses, spoil):
        before = list(self.scheduler.running)
        plan = self.scheduler.plan()
        self.check_plan(plan, before)
        running = list(self.scheduler.running)
        chunks = [guess(self.scheduler, chunk, guesses) for chunk in plan.chunks]
        assert self.scheduler.running == running, "nobody gives way for a guess"
        for chunk in chunks:
            self.scheduler.done(chunk)
        for place, chunk in enumerate(chunks):
            if not chunk.is_last:
                continue
            ends = verify(chunk, tokens)
            self.scheduler.settle(chunk)
            if spoil == place:
                self.scheduler.end(chunk.sequence, spoiled=True)
                del self.asked[chunk.sequence.request.id]
            elif ends:
                assert chunk.sequence.num_generated == self.asked.pop(chunk.sequence.request.id)
                self.scheduler.end(chunk.sequence)

    def check_plan(self, plan: Plan, before: list[Sequence]):
        assert plan.chunks or not (self.scheduler.running or self.scheduler.waiting), "somebody always goes on"
        running = self.scheduler.running
        assert [chunk.sequence for chunk in plan.chunks] == [
            sequence for sequence in running if any(chunk.sequence is sequence for chunk in plan.chunks)
        ]
        prompts = sum(chunk.end - chunk.start for chunk in plan.chunks if len(chunk.sequence.tokens) > chunk.start + 1)
        assert prompts <= SMALL.max_prefill_tokens
        assert all(chunk.sequence.length == chunk.start < chunk.end for chunk in plan.chunks)
        for sequence in running:  # what generates, goes on; the first that came always does
            generates = sequence in before and sequence.num_unread == 1
            assert not generates or any(chunk.sequence is sequence for chunk in plan.chunks)
        if before:
            assert plan.chunks[0].sequence is before[0]

    @rule(place=st.integers(0, 5))
    def cancel(self, place):
        names = list(self.asked)
        if place < len(names):
            self.scheduler.cancel(names[place])
            del self.asked[names[place]]

    @invariant()
    def requests_are_there_in_the_order_they_came(self):
        names = [sequence.request.id for sequence in (*self.scheduler.running, *self.scheduler.waiting)]
        assert names == sorted(self.asked, key=int)
        assert len(self.scheduler.running) <= SMALL.max_rows

    @invariant()
    def no_block_is_lost_or_owned_twice(self):
        pool = self.scheduler.pool
        held = Counter(block for sequence in self.scheduler.running for block in sequence.blocks)
        assert [held[block] for block in range(pool.num_blocks)] == pool._num_holders
        assert len(pool._free) == len(set(pool._free))
        parts = [set(pool._free), set(pool._idle), set(held)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == pool.num_blocks
        assert all(not sequence.blocks for sequence in self.scheduler.waiting)

    @invariant()
    def blocks_hold_what_their_keys_say(self):
        pool, size = self.scheduler.pool, SMALL.block_size
        assert {key: block for block, key in pool._key_of.items()} == pool._by_key
        assert set(pool._idle) <= set(pool._key_of)
        for sequence in self.scheduler.running:
            assert len(set(sequence.blocks)) == len(sequence.blocks) >= -(-sequence.length // size)
            assert len(sequence.blocks) <= -(-len(sequence.tokens) // size), "guesses gave theirs back"
            key = sequence.root
            for index, block in enumerate(sequence.blocks[: sequence.length // size]):
                key = block_key(key, sequence.tokens[index * size : (index + 1) * size])
                assert pool._key_of.get(block) in (key, None)
            unread = sequence.blocks[-(-sequence.length // size) :]
            assert not any(block in pool._key_of for block in unread)

    def teardown(self):
        for _ in range(1000):
            if not (self.scheduler.running or self.scheduler.waiting):
                break
            finish(self.scheduler, self.scheduler.plan())
        assert self.scheduler.pool.num_free == SMALL.num_blocks


class Ranks(RuleBasedStateMachine):
    """Adapters of different ranks come and go."""

    def __init__(self):
        super().__init__()
        self.space, self.ranks = SlotSpace(), {}

    @rule(name=st.sampled_from("abcdef"), rank=st.integers(1, 9))
    def come(self, name, rank):
        if name not in self.ranks:
            before = self.space.size
            run = self.space.take(name, rank)
            self.ranks[name] = rank
            assert len(run) == rank
            assert run.start <= before, "there is no gap before what is taken at the end"

    @rule(name=st.sampled_from("abcdef"))
    def go(self, name):
        if self.ranks.pop(name, None):
            self.space.free(name)

    @invariant()
    def each_has_its_own(self):
        assert {name: len(self.space[name]) for name in self.space.handles} == self.ranks
        owned = [rank for name in self.ranks for rank in self.space[name]]
        assert len(owned) == len(set(owned))
        assert self.space.size == max(owned, default=-1) + 1


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestRanks = Ranks.TestCase
TestRanks.settings = settings(deadline=None, max_examples=30)
