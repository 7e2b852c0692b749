"""The cache of adapters: what it promises, one by one, and that no order of events breaks it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmray.errors import ArtifactError, LmrayError, NoRoomError
from lmray.serve.adapter_cache import AdapterCache, Limits
from tests.unit.serve.loaders import SIZES, FakeLoader

SMALL = sorted(set(SIZES) - {"huge"})


async def idle() -> None:
    """Returns once nothing on the loop can go on by itself."""
    for _ in range(50):
        await asyncio.sleep(0)


def make(max_adapters: int = 2, max_bytes: int = 100, *, by_hand: bool = False, clock=lambda: 0.0):
    loader = FakeLoader(by_hand=by_hand)
    return AdapterCache(loader, Limits(max_adapters, max_bytes), clock=clock), loader


async def use(cache: AdapterCache, *handles: str) -> None:
    for handle in handles:
        await cache.prewarm(handle)
        await idle()


def test_requests_for_one_adapter_share_one_loading_and_others_load_beside_it():
    async def main():
        cache, loader = make(by_hand=True)
        tasks = [asyncio.create_task(cache.prewarm(handle)) for handle in ("a", "a", "b", "a")]
        await idle()
        assert [(kind, handle) for kind, handle, _ in loader.steps] == [("find", "a"), ("find", "b")]
        assert not cache.holds("a"), "it is on its way"
        for _ in range(2):
            for _, _, ends in loader.steps:
                ends.done() or ends.set_result(None)
            await idle()
        assert loader.calls == [("find", "a"), ("find", "b"), ("load", "a"), ("load", "b")]
        assert all(task.done() and task.exception() is None for task in tasks)
        assert cache.holds("a")

    asyncio.run(main())


def test_the_least_recently_used_goes_first_by_count_and_by_bytes():
    async def main():
        cache, loader = make()
        await use(cache, "a", "b", "a", "c")
        assert sorted(loader.loaded) == ["a", "c"]
        cache, loader = make(max_adapters=4, max_bytes=60)
        await use(cache, "a", "b", "c", "d")
        assert sorted(loader.loaded) == ["d"], "40 bytes fit beside none but `a` and `b`, which are older than `c`"

    asyncio.run(main())


def test_what_is_in_use_stays_and_who_needs_its_room_waits():
    async def main():
        cache, loader = make(max_adapters=1)
        async with cache.lease("a"):
            waiting = asyncio.create_task(cache.prewarm("b"))
            await idle()
            assert loader.loaded == {"a": 10} and not waiting.done()
        await waiting
        assert loader.loaded == {"b": 20}
        assert cache.counts == {"hits": 0, "loads": 2, "evictions": 1, "failures": 0}

    asyncio.run(main())


def test_a_hot_adapter_lets_one_in_that_waits_for_its_room():
    async def main():
        cache, loader = make(max_adapters=1)
        async with AsyncExitStack() as running:
            await running.enter_async_context(cache.lease("a"))
            assert cache.holds("a")
            other = asyncio.create_task(cache.prewarm("b"))
            await idle()
            assert not cache.holds("a"), "another request would wait"
            overtaking = asyncio.create_task(cache.prewarm("a"))
            await idle()
            assert not overtaking.done(), "it would keep `b` out for ever"
        await asyncio.gather(other, overtaking)
        assert [step for step in loader.calls if step[0] != "find"] == [
            ("load", "a"), ("unload", "a"), ("load", "b"), ("unload", "b"), ("load", "a"),
        ]  # fmt: skip

    asyncio.run(main())


def test_a_drained_adapter_is_used_again_where_another_made_room_first():
    async def main():
        cache, loader = make(max_adapters=2)
        async with cache.lease("a"):
            async with cache.lease("b"):
                waiting = asyncio.create_task(cache.prewarm("c"))
                await idle()
                again = asyncio.create_task(cache.prewarm("a"))
                await idle()
                assert not again.done()
            await asyncio.gather(waiting, again)
            assert sorted(loader.loaded) == ["a", "c"]

    asyncio.run(main())


def test_what_cannot_be_loaded_is_refused_for_a_while_without_another_look():
    async def main():
        now = 0.0
        cache, loader = make(by_hand=True, clock=lambda: now)
        first = asyncio.create_task(cache.prewarm("a"))
        await idle()
        loader.steps.pop()[2].set_exception(ArtifactError("adapter `a`", "is missing"))
        for attempt in (first, cache.prewarm("a")):
            with pytest.raises(ArtifactError, match="is missing"):
                await attempt
        assert loader.calls == [("find", "a")]
        now, loader.by_hand = 10.0, False
        await cache.prewarm("a")
        assert loader.loaded == {"a": 10}

    asyncio.run(main())


def test_a_failure_of_the_engine_is_not_remembered_and_a_bad_adapter_does_not_delay_a_good_one():
    async def main():
        cache, loader = make(by_hand=True)
        bad = asyncio.create_task(cache.prewarm("a"))
        await idle()
        loader.by_hand = False
        await cache.prewarm("b")
        loader.steps.pop()[2].set_exception(LmrayError("engine", "is closed"))
        with pytest.raises(LmrayError, match="is closed"):
            await bad
        await cache.prewarm("a")
        assert sorted(loader.loaded) == ["a", "b"]

    asyncio.run(main())


def test_pinned_adapters_stay_and_what_does_not_fit_beside_them_is_refused():
    async def main():
        cache, loader = make(max_adapters=2, max_bytes=70)
        await cache.pin("c")
        await use(cache, "a", "b")
        assert sorted(loader.loaded) == ["b", "c"]
        await cache.pin("b")
        found = r"`a`: 10 bytes do not fit beside 2 pinned adapter\(s\) of 50 bytes\n  allowed: 2 adapters, 70 bytes"
        with pytest.raises(NoRoomError, match=found):
            await cache.prewarm("a")
        cache.unpin("c")
        await use(cache, "a")
        assert sorted(loader.loaded) == ["a", "b"]
        with pytest.raises(NoRoomError, match="1000 bytes do not fit"):
            await cache.prewarm("huge")

    asyncio.run(main())


def test_following_pins_what_is_wanted_and_lets_go_of_the_rest():
    async def main():
        cache, loader = make(max_adapters=2)
        cache.follow(["a", "b"])
        await idle()
        cache.follow(["b", "c"])
        await idle()
        held = {one["handle"]: one["pinned"] for one in cache.stats()}
        assert held == {"b": True, "c": True} and sorted(loader.loaded) == ["b", "c"]

    asyncio.run(main())


def test_following_an_adapter_that_cannot_be_loaded_is_logged(caplog):
    async def main():
        cache, _ = make()
        cache.follow(["huge"])
        await idle()
        assert cache.stats() == []

    asyncio.run(main())
    assert "adapter `huge`: 1000 bytes do not fit" in caplog.text


def test_unloading_waits_for_the_running_ones_and_refuses_what_is_pinned_or_unknown():
    async def main():
        cache, loader = make()
        with pytest.raises(ArtifactError, match="`a`: is not loaded\n  allowed: none"):
            await cache.unload("a")
        async with cache.lease("a"):
            leaving = asyncio.create_task(cache.unload("a"))
            await idle()
            assert loader.loaded and not leaving.done()
            again = asyncio.create_task(cache.prewarm("a"))
            await idle()
        await asyncio.gather(leaving, again)
        assert [kind for kind, _ in loader.calls] == ["find", "load", "unload", "find", "load"]
        await cache.pin("a")
        with pytest.raises(ArtifactError, match="is pinned\n  hint: unpin it first"):
            await cache.unload("a")

    asyncio.run(main())


def test_an_engine_that_ended_does_not_keep_others_from_going():
    async def main():
        cache, loader = make(max_adapters=1)
        await cache.prewarm("a")
        loader.by_hand = True
        leaving = asyncio.create_task(cache.unload("a"))
        await idle()
        loader.steps.pop()[2].set_exception(LmrayError("engine", "is closed"))
        await leaving
        assert cache.stats() == []

    asyncio.run(main())


class AnyOrder(RuleBasedStateMachine):
    """Requests come, end and give up, loadings end well or badly, adapters are pinned and unloaded, in any order."""

    MAX_ADAPTERS, MAX_BYTES = 2, 70

    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.now = 0.0
        self.loader = FakeLoader()
        limits = Limits(self.MAX_ADAPTERS, self.MAX_BYTES)
        self.cache = self.run(self.start(limits))
        self.using: list[tuple[str, asyncio.Task, asyncio.Event]] = []
        self.entered: set[int] = set()

    async def start(self, limits: Limits) -> AdapterCache:
        return AdapterCache(self.loader, limits, clock=lambda: self.now)

    def run(self, work):
        return self.loop.run_until_complete(work)

    async def use(self, handle: str, ends: asyncio.Event) -> None:
        async with self.cache.lease(handle):
            assert handle in self.loader.loaded
            self.entered.add(id(ends))
            await ends.wait()
            assert handle in self.loader.loaded, "it was taken out while in use"
            self.entered.discard(id(ends))

    async def swallow(self, work) -> None:
        with suppress(ArtifactError, NoRoomError):
            await work

    @rule(handle=st.sampled_from(SMALL))
    def request(self, handle):
        async def begin():
            ends = asyncio.Event()
            self.using.append((handle, asyncio.create_task(self.swallow(self.use(handle, ends))), ends))
            await idle()

        self.run(begin())

    @precondition(lambda self: self.using)
    @rule(data=st.data(), gives_up=st.booleans())
    def end(self, data, gives_up):
        _, task, ends = self.using.pop(data.draw(st.integers(0, len(self.using) - 1)))
        if gives_up:
            task.cancel()
        else:
            ends.set()
        self.entered.discard(id(ends)) if gives_up else None
        self.run(idle())

    @precondition(lambda self: self.loader.steps)
    @rule(data=st.data(), well=st.booleans())
    def step(self, data, well):
        kind, handle, ends = self.loader.steps.pop(data.draw(st.integers(0, len(self.loader.steps) - 1)))
        if well or kind == "unload":
            ends.set_result(None)
        else:
            ends.set_exception(ArtifactError(handle, "is bad"))
        self.run(idle())

    @precondition(lambda self: self.loader.steps)
    @rule()
    def all_steps_end_well(self):
        self.run(self.end_steps())

    async def end_steps(self):
        while self.loader.steps:
            for _, _, ends in self.loader.steps:
                ends.set_result(None)
            self.loader.steps.clear()
            await idle()

    @rule(handle=st.sampled_from(SMALL), kind=st.sampled_from(["pin", "unpin", "unload", "follow"]))
    def command(self, handle, kind):
        async def begin():
            if kind == "unpin":
                self.cache.unpin(handle)
            elif kind == "follow":
                self.cache.follow([handle])
            else:
                self.waiting = asyncio.create_task(self.swallow(getattr(self.cache, kind)(handle)))
            await idle()

        self.run(begin())

    @rule()
    def time_goes_by(self):
        self.now += 6.0

    @invariant()
    def limits_hold(self):
        held = len(self.loader.loaded) + len(self.loader.arriving)
        assert held <= self.MAX_ADAPTERS and self.loader.num_bytes <= self.MAX_BYTES
        in_use = {handle for handle, _, ends in self.using if id(ends) in self.entered}
        assert in_use <= set(self.loader.loaded)
        for _, task, _ in self.using:
            assert not task.done() or task.exception() is None

    def teardown(self):
        """Whatever happened: once nothing is pinned, requests end and loadings succeed, everyone is served."""

        async def settle():
            self.cache.follow([])
            self.loader.by_hand = False
            for _, _, ends in self.using:
                ends.set()
            for _ in range(5):
                await self.end_steps()
                await idle()
            self.cache.follow([])
            await idle()
            assert [task for _, task, _ in self.using if not task.done()] == [], "somebody waits for ever"
            assert all(one["leases"] == 0 and one["state"] == "ready" for one in self.cache.stats())
            assert {one["handle"] for one in self.cache.stats()} == set(self.loader.loaded)

        self.run(settle())
        self.loop.close()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
