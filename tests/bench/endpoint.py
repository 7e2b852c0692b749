"""An endpoint on Ray Serve: how fast replicas come, what stands before the engine costs, and what many adapters cost.

    lmray bench endpoint [--parts lag,zero,cost,names] [--model smollm2-135m] [--intervals 0,0.1] [--rounds 3]

lag: from the start of a load of 8 clients until a second replica of the tiny model answers, less that replica's own
start; preset `fast`. zero: the same from no replica, until the first token, with the replica's start in it. cost: CPU
time of all processes but the client while 8 clients stream answers of 128 tokens of `--model` on one core, by thread:
what is not the engine's own thread is the cost, given in CPU ms a token and as a share of the engine's. names: a store
of 1,000 adapters in production: seconds for `/v1/models` of a gateway in this process, and memory of its index and of
a replica's engine that is asked all of them in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
from ray import serve as ray_serve
from safetensors.torch import load_file, save_file

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store
from lmray.engines.base import Request, Sampling
from lmray.job import ServeJob
from lmray.models.load import load_model
from lmray.models.source import find_model
from lmray.on_ray.cluster import connected
from lmray.on_ray.serve import serve
from lmray.policies.autoscaling import PRESETS
from lmray.serve.canaries import Canaries
from lmray.serve.catalogue import Catalogue
from lmray.serve.fleet import Fleet
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.serve.live import LiveEngine
from lmray.serve.plan import ServePlan, check_out
from lmray.serve.prepare import prepare
from lmray.testing.tiny import tiny_adapter_folder, tiny_tokenizer
from lmray.testing.waiting import wait_until

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
from machine import describe  # noqa: E402

from tests.on_ray.endpoints import Load, ask, make_job, replica_actors  # noqa: E402

AT_ONCE, NUM_OUT = 8, 128
LONG = [{"role": "user", "content": "Write a long story about a fisherman and the sea."}]
"""Asks for an answer that does not end before NUM_OUT tokens."""
NUM_ADAPTERS = 1000
PROCESSES = (
    "ServeReplica:{name}:engine",
    "ServeReplica:{name}:gateway",
    "ProxyActor",
    "ServeController",
    "raylet",
    "gcs",
)
"""What the command lines of an endpoint's processes contain."""


def lag(root: Path) -> dict[str, float]:
    """Of a second replica, in seconds."""
    job = make_job(root, ("adapter-0", "adapter-1"))
    with serve(job) as service:
        ask(service.url, ("tiny", "adapter-0"))
        began = time.monotonic()
        with Load(service.url, ("tiny", "adapter-0"), at_once=AT_ONCE, max_tokens=NUM_OUT):
            wait_until(lambda: len(replica_actors(job)) > 1, "a second replica")
            made = time.monotonic()
            wait_until(lambda: _running(job) > 1, "its start")
            ready = time.monotonic()
            engine = ray_serve.get_deployment_handle("engine", job.name)
            wait_until(lambda: _all_answer(engine), "its first answer")
            answered = time.monotonic()
    start = ready - made
    return {
        "lag_s": answered - began - start,
        "decided_s": made - began,
        "start_s": start,
        "routed_s": answered - ready,
    }


def zero(root: Path) -> dict[str, float]:
    """To the first token of an endpoint without a replica, in seconds."""
    quick = dataclasses.replace(PRESETS["fast"], downscale_delay_s=1.0)
    before, PRESETS["fast"] = PRESETS["fast"], quick
    job = make_job(root, ("adapter-0",), **{"autoscaling.min_replicas": 0, "autoscaling.max_replicas": 1})
    try:
        with serve(job) as service:
            wait_until(lambda: not replica_actors(job), "no replica")
            began = time.monotonic()
            ask(service.url, ("adapter-0",), max_tokens=1)
            return {"first_token_s": time.monotonic() - began}
    finally:
        PRESETS["fast"] = before


def cost(root: Path, *, model: str, interval_s: float) -> dict[str, float]:
    """CPU ms a token of the engine's thread and of everything else, and the share."""
    changes = {"autoscaling.max_replicas": 1, "engine.max_batch_size": AT_ONCE, "http.stream_interval_s": interval_s}
    job = make_job(root, (), **changes)
    if model != "tiny":
        job = job.changed({"model": {"source": model, "dtype": "bfloat16"}})
    with serve(job) as service:
        name = httpx.get(f"{service.url}/v1/models", timeout=60).json()["data"][0]["id"]
        engine = ray_serve.get_deployment_handle("engine", job.name)

        def tokens() -> int:
            return engine.stats.remote().result()["generated_tokens"]

        with Load(service.url, (name,), at_once=AT_ONCE, max_tokens=NUM_OUT, messages=LONG) as load:
            load.wait_for(AT_ONCE)
            spent, num, began = _cpu_seconds(job), tokens(), time.monotonic()
            load.wait_for(3 * AT_ONCE)
            spent, num = _cpu_seconds(job) - spent, tokens() - num
            seconds = time.monotonic() - began
        errors = [one.error for one in load.outcomes if one.error]
        if errors:
            raise SystemExit(errors[0])
        idle = _cpu_seconds(job)
        time.sleep(10)
        idle = _cpu_seconds(job) - idle
    alone = spent.pop("the engine's thread")
    found = {"tokens_per_s": num / seconds, "engine_ms": 1000 * alone / num}
    found |= {f"{label} ms": 1000 * value / num for label, value in sorted(spent.items())}
    found["cost_ms"] = 1000 * sum(spent.values()) / num
    found["idle_ms"] = 1000 * (sum(idle.values()) / 10) * seconds / num
    found["share"] = sum(spent.values()) / alone
    return found


def _cpu_seconds(job: ServeJob) -> Counter[str]:
    """By kind of process; the engine's busiest thread is counted by itself."""
    found: Counter[str] = Counter()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = " ".join(process.cmdline()[:1])
            kind = next((one for one in PROCESSES if one.format(name=job.name) in line), None)
            if kind is None:
                continue
            times = [one.user_time + one.system_time for one in process.threads()]
            label = kind.split(":")[-1]
            if label == "engine":
                found["the engine's thread"] += max(times)
                times.remove(max(times))
            found[label] += sum(times)
    return found


def names(root: Path) -> dict[str, float]:
    """Of a thousand adapters: `/v1/models` in seconds, at first and later; MiB of the gateway's index; and of a replica
    that holds 16 and is asked all, after 32 of them and at the end."""
    job = make_job(root, (), **{"engine.max_adapters": 16})
    _keep_many(root)
    plan, store = prepare(job), open_store(str(root / "store"))
    before = _mib()
    catalogue = Catalogue(store, plan.served, plan.fit, reserved=plan.model_name)
    fleet = Fleet(_NoReplicas(), catalogue, Canaries(store, "endpoint"))
    app = make_app(fleet, tiny_tokenizer(), GatewaySettings("tiny", 256))
    began = time.monotonic()
    catalogue.refresh()
    found = {"index_s": time.monotonic() - began}
    took = asyncio.run(_ask_names(app))
    found |= {"median_s": statistics.median(took), "slowest_s": max(took), "index_mib": _mib() - before}
    return found | asyncio.run(_ask_all(job, plan, [line.current.ref for line in _lines(catalogue)]))


def _keep_many(root: Path) -> None:
    """Adapters that differ in one number."""
    artifacts, model = Artifacts(open_store(str(root / "store"))), root / "tiny"
    folder = tiny_adapter_folder(model, root / "many", seed=1)
    base = {"source": str(model), "revision": None, "digest": find_model(str(model)).digest}
    tensors = load_file(folder / "adapter_model.safetensors")
    for number in range(NUM_ADAPTERS):
        next(iter(tensors.values()))[0, 0] = number / NUM_ADAPTERS
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        artifacts.promote(artifacts.keep(f"adapter-{number:04}", folder, base=base).ref, "production")


async def _ask_names(app: Any) -> list[float]:
    took = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        for _ in range(30):
            began = time.monotonic()
            response = await client.get("/v1/models")
            took.append(time.monotonic() - began)
            assert len(response.json()["data"]) == 2 * NUM_ADAPTERS + 1
            await asyncio.sleep(0.1)
    return took


async def _ask_all(job: ServeJob, plan: ServePlan, handles: list[str]) -> dict[str, float]:
    model = load_model(check_out(plan), "float32")
    live = LiveEngine(job.engine.start(model, stop_token_ids=(), threads=1), plan)
    await live.start()
    found: dict[str, float] = {}
    began = time.monotonic()
    for number, handle in enumerate(handles):
        async for _ in live.stream(Request(handle, (1, 2, 3), Sampling(max_tokens=1), handle)):
            pass
        if number == 32:
            found["replica_mib"] = _mib()
    held = live.stats()["cache"]["held"]
    found |= {"replica_after_mib": _mib(), "held": len(held), "load_s": (time.monotonic() - began) / len(handles)}
    await live.engine.close()
    return found


def _lines(catalogue: Catalogue) -> list[Any]:
    return [catalogue.line(name) for name in catalogue.names]


def _mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


class _NoReplicas:
    async def stream(self, request: Any):
        raise NotImplementedError
        yield

    async def everywhere(self, method: str, *arguments: Any) -> list[Any]:
        return []


def _running(job: ServeJob) -> int:
    states = ray_serve.status().applications[job.name].deployments["engine"].replica_states
    return sum(count for state, count in states.items() if "RUNNING" in str(state))


def _all_answer(engine: Any) -> bool:
    """Whether two replicas have made more than their warm-up's token."""
    made = [one["generated_tokens"] for one in engine.broadcast("stats").results()]
    return len(made) > 1 and min(made) > 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="lag,zero,cost,names")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--intervals", default="0,0.1", help="of `http.stream_interval_s`, for the part `cost`")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    intervals = asked.intervals.split(",")
    parts: dict[str, Callable[[Path], dict[str, float]]] = {
        "lag": lag,
        "zero": zero,
        **{f"cost at {one} s": partial(cost, model=asked.model, interval_s=float(one)) for one in intervals},
        "names": names,
    }
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"`{shlex.join(['lmray', 'bench', 'endpoint', *sys.argv[1:]])}`\n{describe(1)}\n")
    with connected(num_cpus=4):
        for part in [part for part in parts if part.split()[0] in asked.parts.split(",")]:
            for _ in range(asked.rounds if part != "names" else 1):
                with tempfile.TemporaryDirectory(prefix="endpoint-") as folder:
                    root = Path(folder) / part.split()[0]
                    root.mkdir()
                    found = parts[part](root)
                print(f"{part}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
