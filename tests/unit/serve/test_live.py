"""A real engine whose adapters come from a store while it runs: promotion, rollback, pins, bad versions."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmray.artifacts.artifact import Artifact, Artifacts
from lmray.artifacts.served import AdapterCache, ServedAdapter
from lmray.artifacts.store import open_store
from lmray.engines.base import Request, Sampling
from lmray.engines.native import Native
from lmray.errors import ArtifactError, NoRoomError
from lmray.models.load import load_model
from lmray.models.source import find_model
from lmray.serve import catalogue
from lmray.serve.live import LiveEngine
from lmray.serve.pins import Pins
from lmray.serve.plan import ServePlan
from lmray.testing.tiny import tiny_adapter_folder

PROMPT, MAX_TOKENS = (10, 20, 30), 12


class Place:
    """A store, the adapters in it, and an engine to serve them with."""

    def __init__(self, root: Path, model: Path):
        self.root, self.model, self.digest = root, model, find_model(str(model)).digest
        self.store = open_store(str(root / "store"))
        self.artifacts = Artifacts(self.store)

    def keep(self, name: str, seed: int, stage: str = "production", **told) -> Artifact:
        folder = self.root / f"adapter-{seed}"
        if not folder.exists():
            tiny_adapter_folder(self.model, folder, seed=seed)
        artifact = self.artifacts.keep(name, folder, base={"source": "tiny", "digest": self.digest, **told})
        return self.artifacts.promote(artifact.ref, stage)

    def plan(self, *served: str, adapters: dict[str, str] | None = None) -> ServePlan:
        return ServePlan(
            model_name="tiny",
            source=str(self.model),
            revision=None,
            digest=self.digest,
            store=str(self.store.root),
            endpoint="endpoint",
            served=tuple(ServedAdapter(artifact=name, stage="production") for name in served),
            cache=AdapterCache(),
            adapters=adapters or {},
            keys=(),
        )

    def start(self, *served: str, max_adapters: int = 4, adapters: dict[str, str] | None = None) -> LiveEngine:
        config = Native(max_batch_size=4, max_adapters=max_adapters, max_length=64)
        engine = config.start(load_model(self.model, "float32"), stop_token_ids=(), threads=1)
        return LiveEngine(engine, self.plan(*served, adapters=adapters), store=self.store)


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch) -> Iterator[Place]:
    monkeypatch.setattr(catalogue, "EVERY_S", 0.0)
    monkeypatch.setattr(catalogue, "PATIENCE_S", 10.0)
    before = set(threading.enumerate())
    yield Place(tmp_path, tiny_model)
    left = [one.name for one in threading.enumerate() if one not in before and one.name == "lmray-engine"]
    assert not left, "an engine was not closed"


def request(adapter: str | None, name: str = "r") -> Request:
    return Request(name, PROMPT, Sampling(max_tokens=MAX_TOKENS), adapter)


async def text(live: LiveEngine, adapter: str | None, name: str = "r") -> list[int | None]:
    return [event.token_id async for event in live.stream(request(adapter, name))]


def test_each_token_says_how_long_after_the_one_before_it_came(place):
    async def main():
        live = place.start()
        await live.start()
        began = time.perf_counter()
        events = [event async for event in live.stream(request(None))]
        seconds = time.perf_counter() - began
        await live.engine.close()
        return events, seconds

    (first, *others), seconds = asyncio.run(main())
    assert first.after_s is None and len(others) == MAX_TOKENS - 1
    assert all(event.after_s > 0 for event in others) and sum(event.after_s for event in others) < seconds


def test_a_version_is_loaded_when_it_is_first_asked_for(place):
    artifact = place.keep("helper", seed=1)

    async def main():
        live = place.start("*")
        await live.start()
        assert live.stats()["adapters"] == []
        assert live.holds(None) and not live.holds(artifact.ref)
        adapted = await text(live, artifact.ref)
        assert live.holds(artifact.ref)
        assert adapted != await text(live, None)
        assert live.stats()["adapters"] == [artifact.ref]
        assert live.stats()["cache"]["held"][0]["num_bytes"] == artifact.num_bytes
        await live.engine.close()

    asyncio.run(main())


def test_a_promotion_is_loaded_ahead_and_what_runs_ends_with_the_old_version(place):
    first = place.keep("helper", seed=1)

    async def main():
        live = place.start("helper")
        await live.start()
        assert live.stats()["adapters"] == [first.ref]
        old = await text(live, first.ref)
        running = live.stream(request(first.ref, "running"))
        began = [(await anext(running)).token_id]
        second = place.keep("helper", seed=2)
        await live.follow()
        await live.cache.prewarm(second.ref)
        assert [call["pinned"] for call in live.cache.stats() if call["handle"] == second.ref] == [True]
        assert await text(live, second.ref, "new") != old
        assert began + [event.token_id async for event in running] == old
        place.artifacts.rollback("helper", "production")
        await live.follow()
        pinned = {one["handle"]: one["pinned"] for one in live.cache.stats()}
        assert pinned == {first.ref: True, second.ref: False}
        assert await text(live, first.ref) == old
        await live.engine.close()

    asyncio.run(main())


def test_a_version_promoted_since_the_last_look_takes_the_room_of_the_one_it_replaces(place, monkeypatch):
    first = place.keep("helper", seed=1)

    async def main():
        live = place.start("helper", max_adapters=1)
        await live.start()
        old = await text(live, first.ref)
        monkeypatch.setattr(catalogue, "EVERY_S", 1000.0)
        second = place.keep("helper", seed=2)
        assert await text(live, second.ref) != old
        with pytest.raises(NoRoomError, match="1 pinned adapter"):
            await text(live, first.ref)
        await live.engine.close()

    asyncio.run(main())


def test_pins_of_an_operator_are_followed_and_survive(place):
    artifact = place.keep("helper", seed=1)
    Pins(place.store, "endpoint").change("helper", pinned=True)

    async def main():
        live = place.start("*")
        await live.start()
        assert live.stats()["adapters"] == [artifact.ref]
        Pins(place.store, "endpoint").change("helper", pinned=False)
        await live.follow()
        assert not live.cache.stats()[0]["pinned"]
        place.store.put("endpoints/endpoint/pins.json", b"{")
        await live.follow()
        await live.engine.close()

    asyncio.run(main())


def test_an_adapter_whose_shapes_do_not_fit_is_refused_and_others_go_on(place, tmp_path):
    good = place.keep("good", seed=1)
    folder = place.root / "adapter-1" / "adapter_config.json"
    folder.write_text(folder.read_text().replace('"r": 4', '"r": 8'))
    bad = place.keep("bad", seed=1)

    async def main():
        live = place.start("*")
        await live.start()
        with pytest.raises(ArtifactError, match="does not fit its config"):
            await text(live, bad.ref)
        assert await text(live, good.ref)
        with pytest.raises(ArtifactError, match="does not fit its config"):
            await text(live, bad.ref)
        assert live.cache.counts["failures"] == 1, "it was read again at once"
        await live.engine.close()

    asyncio.run(main())


def test_a_bad_version_keeps_no_replica_from_starting_but_the_one_that_was_prepared(place):
    good = place.keep("good", seed=1)
    folder = place.root / "adapter-2"
    tiny_adapter_folder(place.model, folder, seed=2)
    (folder / "adapter_model.safetensors").write_bytes(b"none")
    bad = place.keep("bad", seed=2)

    async def main():
        live = place.start("good", "bad")
        await live.start()
        assert live.stats()["adapters"] == [good.ref]
        await live.engine.close()
        prepared = place.start("good", "bad", adapters={"bad": bad.id})
        with pytest.raises(ArtifactError, match="is no safetensors file"):
            await prepared.start()
        await prepared.engine.close()

    asyncio.run(main())


def test_pins_take_no_room_from_what_was_prepared_and_their_failures_stop_no_start(place, monkeypatch):
    pinned = place.keep("a-pinned", seed=1)
    named = place.keep("named", seed=2)
    Pins(place.store, "endpoint").change("a-pinned", pinned=True)

    async def main():
        live = place.start("named", "*", max_adapters=1, adapters={"named": named.id})
        await live.start()
        assert live.stats()["adapters"] == [named.ref]
        await live.engine.close()
        roomy = place.start("named", "*", adapters={"named": named.id})
        load = roomy.cache._loader.load

        async def fail(handle, found):
            if handle == pinned.ref:
                raise OSError(5, "Input/output error")
            await load(handle, found)

        monkeypatch.setattr(roomy.cache._loader, "load", fail)
        await roomy.start()
        assert roomy.stats()["adapters"] == [named.ref]
        await roomy.engine.close()

    asyncio.run(main())


def test_more_adapters_than_the_engine_holds_take_turns(place):
    handles = [place.keep(f"a{seed}", seed=seed).ref for seed in (1, 2, 3)]

    async def main():
        live = place.start("*", max_adapters=1)
        await live.start()
        alone = [await text(live, handle) for handle in handles]
        together = await asyncio.gather(*(text(live, handle, handle) for handle in handles))
        assert together == alone
        assert len(live.stats()["adapters"]) == 1
        await live.engine.close()

    asyncio.run(main())
