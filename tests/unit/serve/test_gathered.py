"""Tokens sent on together: nothing is lost, late, or out of order, and leaving early ends the work."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from lmray.serve.gathered import gathered

FOR_EVER = 1000.0


def test_the_first_comes_at_once_and_what_follows_together():
    async def main():
        may_go_on = asyncio.Event()

        async def count():
            yield 0
            await may_go_on.wait()
            for number in range(1, 4):
                yield number

        lists = []
        async with aclosing(gathered(count(), FOR_EVER)) as found:
            async for one in found:
                lists.append(one)
                may_go_on.set()
        return lists

    assert asyncio.run(main()) == [[0], [1, 2, 3]]


def test_without_an_interval_nothing_waits():
    async def main():
        gate = asyncio.Semaphore(0)

        async def count():
            for number in range(3):
                yield number
                await gate.acquire()

        lists = []
        async for one in gathered(count(), 0.0):
            lists.append(one)
            gate.release()
        return lists

    assert asyncio.run(main()) == [[0], [1], [2]]


def test_a_failure_comes_behind_what_came_before_it():
    async def main():
        async def fail():
            yield 0
            await asyncio.sleep(0)
            yield 1
            raise ZeroDivisionError

        lists = []
        with pytest.raises(ZeroDivisionError):
            async for one in gathered(fail(), FOR_EVER):
                lists.append(one)
        return lists

    assert asyncio.run(main()) == [[0], [1]]


def test_leaving_early_ends_what_is_gathered():
    async def main():
        closed = asyncio.Event()

        async def hang():
            try:
                yield 0
                await asyncio.Event().wait()
            finally:
                closed.set()

        async with aclosing(gathered(hang(), FOR_EVER)) as found:
            assert await anext(found) == [0]
        return closed.is_set()

    assert asyncio.run(main())


def test_nothing_at_all_is_no_list():
    async def main():
        async def none():
            return
            yield

        return [one async for one in gathered(none(), 1.0)]

    assert asyncio.run(main()) == []
