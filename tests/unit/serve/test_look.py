"""Looks at what takes its time: how many there are, who waits for them, and what is told meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from lmray.errors import RemoteError
from lmray.serve import look as module
from lmray.serve.look import FRESH_S, Look


class Replicas:
    """Tells how often it was asked, raises `failure`, or answers once it is let."""

    def __init__(self):
        self.calls, self.now_s = 0, 100.0
        self.failure: Exception | None = None
        self.answers = asyncio.Event()
        self.answers.set()

    async def ask(self) -> int:
        self.calls += 1
        told = self.calls
        await self.answers.wait()
        if self.failure is not None:
            raise self.failure
        return told


@pytest.fixture
def replicas(monkeypatch) -> Replicas:
    monkeypatch.setattr(module, "PATIENCE_S", 0.01)
    return Replicas()


@pytest.fixture
def look(replicas) -> Look[int]:
    return Look(replicas.ask, clock=lambda: replicas.now_s)


def test_however_many_ask_there_is_one_look_in_a_while(replicas, look):
    async def main():
        assert await asyncio.gather(*(look.told() for _ in range(20))) == [1] * 20
        replicas.now_s += FRESH_S
        assert [await look.told() for _ in range(20)] == [2] * 20

    asyncio.run(main())


def test_replicas_that_take_long_are_not_waited_for_nor_asked_again(replicas, look):
    async def main():
        assert await look.told() == 1
        replicas.answers.clear()
        for _ in range(3):
            replicas.now_s += FRESH_S
            assert await look.told() == 1, "what they told before holds"
        assert replicas.calls == 2
        replicas.answers.set()
        assert await look.told() == 2

    asyncio.run(main())


def test_a_look_goes_on_when_the_one_who_asked_for_it_leaves(replicas, look):
    async def main():
        replicas.answers.clear()
        asking = asyncio.create_task(look.told())
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait({asking})
        replicas.answers.set()
        assert await look.told() == 1

    asyncio.run(main())


def test_before_any_answer_and_after_a_failure_there_is_nothing_to_tell(replicas, look):
    async def main():
        replicas.answers.clear()
        with pytest.raises(RemoteError, match="endpoint: no replica has answered yet\n  hint: come back in a moment"):
            await look.told()
        replicas.failure = RemoteError("endpoint", "no replica answered: TimeoutError")
        replicas.answers.set()
        for _ in range(2):
            with pytest.raises(RemoteError, match="TimeoutError"):
                await look.told()
        replicas.now_s, replicas.failure = replicas.now_s + FRESH_S, ValueError("a bug")
        with pytest.raises(ValueError, match="a bug"):
            await look.told()
        assert replicas.calls == 2

    asyncio.run(main())
