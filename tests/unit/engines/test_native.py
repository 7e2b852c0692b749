"""The engine from the outside: an event loop, one worker thread, and what happens when either goes wrong."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
import torch

from lmray.engines._decoder import Linears
from lmray.engines.base import Request, Sampling, TokenEvent
from lmray.engines.native import Native
from lmray.errors import ArtifactError, CapacityError, DataError, LmrayError
from tests.unit.engines.conftest import NUM_NEW, STOP


class Running:
    """A started engine for the length of a block."""

    def __init__(self, model, **changes):
        config = Native(**{"max_batch_size": 4, "max_length": 128, **changes})
        self.engine = config.start(model, stop_token_ids=STOP, threads=1)

    async def __aenter__(self):
        return self.engine

    async def __aexit__(self, *exc_info):
        await self.engine.close()


async def tokens(engine, request: Request) -> list[int]:
    return [event.token_id async for event in engine.submit(request) if event.token_id is not None]


def test_a_request_joins_while_another_runs(model, prompts, expected):
    async def main():
        async with Running(model) as engine:
            first = engine.submit(Request("first", prompts[0], Sampling(NUM_NEW)))
            got = [(await anext(first)).token_id for _ in range(3)]
            joined = await tokens(engine, Request("second", prompts[3], Sampling(NUM_NEW)))
            got += [event.token_id async for event in first if event.token_id is not None]
            return got, joined

    assert asyncio.run(main()) == (expected[None][0], expected[None][3])


def test_closing_the_generator_frees_the_row_for_who_waits(model, prompts, expected):
    async def main():
        async with Running(model, max_batch_size=1) as engine:
            async with aclosing(engine.submit(Request("long", prompts[0], Sampling(120)))) as events:
                await anext(events)
                waiting = asyncio.ensure_future(tokens(engine, Request("next", prompts[1], Sampling(NUM_NEW))))
                await anext(events)
            return await waiting, engine.stats()

    answer, stats = asyncio.run(main())
    assert answer == expected[None][1]
    assert (stats["running"], stats["waiting"]) == (0, 0)
    assert stats["generated_tokens"] < 120


def test_cancelling_the_task_frees_the_row_too(model, prompts, expected):
    async def main():
        async with Running(model, max_batch_size=1) as engine:
            begun = asyncio.Event()

            async def ask():
                async for _ in engine.submit(Request("long", prompts[0], Sampling(120))):
                    begun.set()

            task = asyncio.ensure_future(ask())
            await begun.wait()
            task.cancel()
            return await tokens(engine, Request("next", prompts[1], Sampling(NUM_NEW)))

    assert asyncio.run(main()) == expected[None][1]


def test_adapters_come_and_go_while_requests_run(model, adapter_folders, prompts, expected):
    async def main():
        async with Running(model) as engine:
            base = engine.submit(Request("base", prompts[0], Sampling(NUM_NEW)))
            got = [(await anext(base)).token_id]
            await engine.add_adapter("with.dots-and-日本語", adapter_folders["a"])
            await engine.add_adapter("b", adapter_folders["b"])
            names = engine.stats()["adapters"]
            with_a = engine.submit(Request("a", prompts[1], Sampling(NUM_NEW), "with.dots-and-日本語"))
            answer = [(await anext(with_a)).token_id]
            leaving = asyncio.ensure_future(engine.remove_adapter("with.dots-and-日本語"))
            answer += [event.token_id async for event in with_a if event.token_id is not None]
            await leaving
            got += [event.token_id async for event in base if event.token_id is not None]
            other = await tokens(engine, Request("b", prompts[2], Sampling(NUM_NEW), "b"))
            return names, answer, got, other, engine.stats()["adapters"]

    names, answer, got, other, left = asyncio.run(main())
    assert names == ["b", "with.dots-and-日本語"]
    assert (answer, got, other) == (expected["a"][1], expected[None][0], expected["b"][2])
    assert left == ["b"]


def test_an_adapter_that_leaves_is_refused_at_once_and_its_name_is_free_after(model, adapter_folders, prompts):
    async def main():
        async with Running(model) as engine:
            await engine.add_adapter("a", adapter_folders["a"])
            running = engine.submit(Request("runs", prompts[0], Sampling(NUM_NEW), "a"))
            await anext(running)
            leaving = asyncio.ensure_future(engine.remove_adapter("a"))
            await asyncio.wait({leaving}, timeout=0)
            with pytest.raises(ArtifactError, match="unknown adapter `a`"):
                await tokens(engine, Request("late", prompts[1], Sampling(1), "a"))
            with pytest.raises(ArtifactError, match="is loaded already"):
                await engine.add_adapter("a", adapter_folders["b"])
            with pytest.raises(ArtifactError, match="is not loaded"):
                await engine.remove_adapter("a")
            await running.aclose()
            await leaving
            await engine.add_adapter("a", adapter_folders["b"])
            return await tokens(engine, Request("new", prompts[1], Sampling(NUM_NEW), "a"))

    assert asyncio.run(main())


def test_a_name_stands_for_its_new_content_after_a_reload(model, adapter_folders, prompts, expected):
    async def main():
        async with Running(model) as engine:
            answers = []
            for folder in adapter_folders.values():
                await engine.add_adapter("same", folder)
                answers.append(await tokens(engine, Request("r", prompts[3], Sampling(NUM_NEW), "same")))
                await engine.remove_adapter("same")
            return answers

    assert asyncio.run(main()) == [expected["a"][3], expected["b"][3]]


def test_a_bad_adapter_is_refused_and_its_name_stays_free(model, adapter_folders, tmp_path):
    async def main():
        async with Running(model, max_adapters=1) as engine:
            with pytest.raises(ArtifactError, match=r"adapter_config\.json: cannot be read"):
                await engine.add_adapter("a", tmp_path)
            await engine.add_adapter("a", adapter_folders["a"])
            with pytest.raises(CapacityError, match="1 adapters are loaded already"):
                await engine.add_adapter("b", adapter_folders["b"])
            return engine.stats()["failure"]

    assert asyncio.run(main()) is None


def test_an_adapter_that_fails_while_it_is_put_costs_nothing_but_itself(
    model, adapter_folders, prompts, expected, monkeypatch
):
    put, num_put = Linears.put, 0

    def fail_later(self, *args):
        nonlocal num_put
        num_put += 1
        put(self, *args)
        if num_put == 3:
            raise torch.OutOfMemoryError("no room")

    async def main():
        async with Running(model) as engine:
            await engine.add_adapter("b", adapter_folders["b"])
            with monkeypatch.context() as patched:
                patched.setattr(Linears, "put", fail_later)
                with pytest.raises(ArtifactError, match="cannot be loaded: OutOfMemoryError: no room"):
                    await engine.add_adapter("a", adapter_folders["a"])
            assert engine.stats()["failure"] is None and engine.stats()["adapters"] == ["b"]
            await engine.add_adapter("a", adapter_folders["a"])
            return [await tokens(engine, Request("r", prompts[0], Sampling(NUM_NEW), one)) for one in (None, "a", "b")]

    assert asyncio.run(main()) == [expected[one][0] for one in (None, "a", "b")]


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ((), "the prompt is empty"),
        ((5,) * 128, "the prompt has 128 tokens\n  allowed: up to 127"),
        ((5, 264), "token 264 is none of the model's\n  allowed: 0 to 263"),
        ((-1,), "token -1"),
    ],
)
def test_prompts_that_cannot_be_run_are_refused(model, prompt, found):
    async def main():
        async with Running(model) as engine:
            await tokens(engine, Request("r", prompt, Sampling(1)))

    with pytest.raises(DataError) as caught:
        asyncio.run(main())
    assert found in str(caught.value)


def test_an_id_that_runs_already_is_refused(model, prompts):
    async def main():
        async with (
            Running(model) as engine,
            aclosing(engine.submit(Request("same", prompts[0], Sampling(99)))) as events,
        ):
            await anext(events)
            with pytest.raises(DataError, match="is running already"):
                await tokens(engine, Request("same", prompts[1], Sampling(1)))

    asyncio.run(main())


def test_a_step_that_fails_ends_every_request_and_the_engine_says_so(model, prompts, adapter_folders, monkeypatch):
    async def main():
        async with Running(model, max_batch_size=1) as engine:
            running = engine.submit(Request("runs", prompts[0], Sampling(120)))
            await anext(running)
            waiting = asyncio.ensure_future(tokens(engine, Request("waits", prompts[1], Sampling(9))))
            await asyncio.wait({waiting}, timeout=0)

            def boom(*args, **kwargs):
                raise MemoryError("no room")

            monkeypatch.setattr(engine._stepper, "_forward", boom)
            with pytest.raises(LmrayError, match="a step failed: MemoryError: no room"):
                async for _ in running:
                    pass
            with pytest.raises(LmrayError, match="a step failed: MemoryError"):
                await waiting
            with pytest.raises(LmrayError, match="a step failed: MemoryError"):
                await tokens(engine, Request("late", prompts[1], Sampling(9)))
            with pytest.raises(LmrayError, match="a step failed: MemoryError"):
                await engine.add_adapter("a", adapter_folders["a"])
            return engine.stats()

    stats = asyncio.run(main())
    assert "no room" in stats["failure"]
    assert (stats["running"], stats["waiting"]) == (0, 0)


def test_closing_the_engine_ends_its_requests_and_its_thread(model, prompts):
    async def main():
        async with Running(model) as engine:
            running = engine.submit(Request("runs", prompts[0], Sampling(120)))
            await anext(running)
            await engine.close()
            with pytest.raises(LmrayError, match="engine `native`: is closed"):
                async for _ in running:
                    pass
            with pytest.raises(LmrayError, match="is closed"):
                await tokens(engine, Request("late", prompts[0], Sampling(1)))
            return engine

    assert not asyncio.run(main())._thread.is_alive()


def test_the_last_event_of_an_answer_says_why_it_ended(model, prompts, expected):
    async def main():
        async with Running(model) as engine:
            return [event async for event in engine.submit(Request("r", prompts[0], Sampling(2)))]

    first, last = expected[None][0][:2]
    assert asyncio.run(main()) == [TokenEvent("r", first, None), TokenEvent("r", last, "length")]
