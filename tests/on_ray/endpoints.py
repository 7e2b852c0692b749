"""What tests of running endpoints share: a job over adapters that each answer with a text of their own, and a load of
many clients that goes on until it is told to stop."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import ray

from lmray.artifacts.artifact import Artifacts
from lmray.artifacts.store import open_store
from lmray.job import ServeJob
from lmray.models.source import find_model
from lmray.testing.listening import free_port
from lmray.testing.tiny import tiny_adapter_folder, tiny_model_folder
from lmray.testing.waiting import wait_until

MESSAGES: Any = [{"role": "user", "content": "hi"}]
ADMIN_KEY = "an operator's key"


def make_job(root: Path, names: Sequence[str], **changes: Any) -> ServeJob:
    """An endpoint over the tiny model and a store with an adapter in production under each of `names`."""
    model = tiny_model_folder(root / "tiny")
    for seed, name in enumerate(names):
        keep_version(root, name, seed=seed + 1)
    (root / "admin-keys").write_text(f"{ADMIN_KEY}\n")
    job = ServeJob.model_validate(
        {
            "name": root.name.replace("_", "-"),
            "model": {"source": str(model), "dtype": "float32"},
            "adapters": [{"artifact": "adapter-*", "stage": "production"}],
            "engine": {"name": "native", "max_batch_size": 4, "max_length": 256, "max_adapters": 32},
            "http": {"port": free_port(), "admin_keys_file": str(root / "admin-keys")},
            "autoscaling": {"min_replicas": 1, "max_replicas": 2, "preset": "fast"},
            "resources": {"cpus_per_worker": 1},
            "storage": str(root / "store"),
        }
    )
    return job.changed(changes)


def keep_version(root: Path, name: str, *, seed: int) -> str:
    """Puts another version of adapter `name` into production; equal seeds give equal answers."""
    model = root / "tiny"
    artifacts = Artifacts(open_store(str(root / "store")))
    folder = tiny_adapter_folder(model, root / f"seed-{seed}", seed=seed)
    base = {"source": str(model), "revision": None, "digest": find_model(str(model)).digest}
    return artifacts.promote(artifacts.keep(name, folder, base=base).ref, "production").ref


def replica_actors(job: ServeJob) -> list[str]:
    """Actor names of the engine replicas that are there, also of those that start or end."""
    names = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in names if f"{job.name}#engine" in one["name"]]


def kill_replica(job: ServeJob) -> None:
    """One of those that are there; one that ends by itself meanwhile is none."""

    def killed() -> bool:
        for name in replica_actors(job):
            with suppress(ValueError):
                ray.kill(ray.get_actor(name, namespace="serve"))
                return True
        return False

    wait_until(killed, "a replica to kill")


def resident_bytes(job: ServeJob, deployment: str = "engine") -> list[int]:
    """Memory of the process of each replica of `deployment`."""
    return list(resident_by_process(job, deployment).values())


def resident_by_process(job: ServeJob, deployment: str = "engine") -> dict[int, int]:
    """The same, by process id."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            title = "".join(process.cmdline()[:1])  # of one that has just ended there is none
            if f"ServeReplica:{job.name}:{deployment}" in title:
                found[process.pid] = process.memory_info().rss
    return found


def ask(url: str, names: Sequence[str], *, max_tokens: int = 8) -> dict[str, str]:
    """What each adapter answers."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        told = {"messages": MESSAGES, "temperature": 0, "max_tokens": max_tokens}
        return {
            name: str(client.chat.completions.create(model=name, **told).choices[0].message.content) for name in names
        }


@dataclass(frozen=True)
class Outcome:
    """How one streamed request ended."""

    model: str
    text: str
    started_s: float
    begun: bool
    """Whether a first token came."""
    first_s: float = 0.0
    error: str = ""
    ended_s: float = 0.0


class Load:
    """`at_once` clients that ask the adapters in turn, each answer streamed, until `stop`."""

    def __init__(
        self,
        url: str,
        names: Sequence[str],
        *,
        at_once: int,
        max_tokens: int = 32,
        messages: Any = MESSAGES,
        rest_s: float = 0.0,
    ):
        """`rest_s`: what each client leaves between its requests, so that replicas that start get some of a small
        machine."""
        self.outcomes: list[Outcome] = []
        self._rest_s = rest_s
        self._url = url
        self._told = {"messages": messages, "temperature": 0, "max_tokens": max_tokens, "stream": True}
        self._coming = itertools.cycle(names)
        self._ends = threading.Event()
        self._pool = ThreadPoolExecutor(at_once)
        self._clients = [self._pool.submit(self._run) for _ in range(at_once)]

    def wait_for(self, num: int) -> None:
        """Returns once `num` more requests have ended."""
        goal = len(self.outcomes) + num
        wait_until(lambda: len(self.outcomes) >= goal, f"{num} more answers")

    def stop(self) -> list[Outcome]:
        """Lets running requests end, and gives all."""
        self._ends.set()
        for client in self._clients:
            client.result()
        self._pool.shutdown()
        return self.outcomes

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _run(self) -> None:
        with openai.OpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            while not self._ends.wait(self._rest_s):
                self.outcomes.append(self._ask(client, next(self._coming)))

    def _ask(self, client: openai.OpenAI, model: str) -> Outcome:
        started_s, first_s, text, error = time.monotonic(), 0.0, "", ""
        try:
            for chunk in client.chat.completions.create(model=model, **self._told):
                first_s = first_s or time.monotonic()
                text += chunk.choices[0].delta.content or ""
        except (openai.OpenAIError, httpx.HTTPError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        return Outcome(model, text, started_s, bool(first_s), first_s, error, time.monotonic())
