"""An endpoint under load for a long time: nothing may be lost, nobody may be answered by another's adapter. What its
processes hold is told.

    lmray bench soak [--minutes 30] [--adapters 20] [--at-once 2]

The tiny model with so many adapters, each of which answers with a text of its own. While clients ask them in turn, a
replica is killed, the endpoint is updated, the number of its replicas changes and an adapter is promoted, by turns, one
of these a minute. A line a minute says how many requests ended, how many got no answer (lost) or another text than the
one that was in production (wrong), how many broke off where their replica died, how long whole answers took, and what
the replicas and the gateway hold. Exit code 1 where a request was lost or wrong, or more broke off than died replicas
had begun.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
from machine import describe  # noqa: E402

from lmray.job import ServeJob  # noqa: E402
from lmray.on_ray.serve import Service, serve  # noqa: E402
from tests.on_ray.endpoints import (  # noqa: E402
    Load,
    Outcome,
    ask,
    keep_version,
    kill_replica,
    make_job,
    resident_bytes,
)
from tests.on_ray.local import local_ray  # noqa: E402

MAX_TOKENS, EVERY_S, LINE_S = 32, 60.0, 60.0
NOTICED_S = 60.0
"""After a promotion, requests that start may get the version before for so long."""
ENDPOINT = {"autoscaling.min_replicas": 2, "autoscaling.max_replicas": 2}


@dataclass
class Versions:
    """What an adapter answers, and since when."""

    texts: list[tuple[float, str]]

    def allows(self, one: Outcome) -> bool:
        """Whether `one` got the text of a version that was in production while it was answered."""
        ends = [since + NOTICED_S for since, _ in self.texts[1:]] + [float("inf")]
        return any(
            text == one.text and since <= one.ended_s and one.started_s <= end
            for (since, text), end in zip(self.texts, ends, strict=True)
        )


@dataclass
class Soak:
    """What happens to a running endpoint meanwhile. `known`: what an adapter of each seed answers."""

    root: Path
    service: Service
    job: ServeJob
    known: dict[int, str]
    versions: dict[str, Versions]
    killed: int = 0
    done: list[str] = field(default_factory=list)

    def kill(self) -> None:
        kill_replica(self.job)
        self.killed += 1

    def update(self) -> None:
        self._become({"http.limits.max_body_bytes": self.job.http.limits.max_body_bytes + 1})

    def scale(self) -> None:
        self._become({"autoscaling.min_replicas": 3 - self.job.autoscaling.min_replicas})

    def promote(self) -> None:
        """The next adapter in turn, to the version of a seed of no other, and later back."""
        names, extra = list(self.versions), [seed for seed in self.known if seed > len(self.versions)]
        number = self.done.count("promote") // 2
        name = names[number % len(names)]
        back = self.done.count("promote") % 2
        seed = number % len(names) + 1 if back else extra[number % len(extra)]
        self.versions[name].texts.append((time.monotonic(), self.known[seed]))
        keep_version(self.root, name, seed=seed)

    def _become(self, changes: dict[str, int]) -> None:
        changed = self.job.changed(changes)
        self.service.update(changed)
        self.job = changed

    def act(self, name: str) -> None:
        getattr(self, name)()
        self.done.append(name)


@dataclass
class Tally:
    """Outcomes by how they ended."""

    requests: int = 0
    lost: list[Outcome] = field(default_factory=list)
    wrong: list[Outcome] = field(default_factory=list)
    broken: int = 0
    took_s: list[float] = field(default_factory=list)

    def add(self, outcomes: list[Outcome], versions: dict[str, Versions]) -> None:
        self.requests += len(outcomes)
        self.lost += [one for one in outcomes if one.error and not one.begun]
        self.broken += sum(bool(one.error and one.begun) for one in outcomes)
        answered = [one for one in outcomes if not one.error]
        self.wrong += [one for one in answered if not versions[one.model].allows(one)]
        self.took_s += [one.ended_s - one.started_s for one in answered]

    def line(self) -> str:
        told = f"{self.requests} requests, {len(self.lost)} lost, {len(self.wrong)} wrong, {self.broken} broke off"
        if len(self.took_s) < 2:
            return told
        p50, p99 = (1000 * statistics.quantiles(self.took_s, n=100)[at] for at in (49, 98))
        return f"{told}; p50 {p50:.0f} ms, p99 {p99:.0f} ms"


def memory(job: ServeJob) -> str:
    """MiB of each process."""
    found = {kind: sorted(one >> 20 for one in resident_bytes(job, kind)) for kind in ("engine", "gateway")}
    return "; ".join(f"{kind} {' '.join(map(str, held))} MiB" for kind, held in found.items())


@dataclass
class Report:
    """Tells what ended since the last line, and keeps the whole."""

    soak: Soak
    load: Load
    total: Tally = field(default_factory=Tally)
    num_seen: int = 0
    num_acts: int = 0

    def count(self) -> Tally:
        outcomes, latest = self.load.outcomes[self.num_seen :], Tally()
        self.num_seen += len(outcomes)
        for tally in (self.total, latest):
            tally.add(outcomes, self.soak.versions)
        return latest

    def line(self, minute: int) -> None:
        acts, self.num_acts = self.soak.done[self.num_acts :], len(self.soak.done)
        told = f"{self.count().line()}; {memory(self.soak.job)}; done: {', '.join(acts) or 'nothing'}"
        print(f"minute {minute}: {told}", flush=True)


def go_on(soak: Soak, report: Report, *, minutes: float) -> None:
    """Does one thing after another, and tells of each minute, until the time is over and the last thing is done."""
    turns, line, began = itertools.cycle(("kill", "promote", "update", "scale")), 1, time.monotonic()
    end, every_s = began + 60 * minutes, min(EVERY_S, 60 * minutes / 6)
    due, running = began + every_s / 2, Future[None]()
    running.set_result(None)
    with ThreadPoolExecutor(1) as hand:
        while (now := time.monotonic()) < end or not running.done():
            if running.done():
                running.result()
                if due <= now < end:
                    due, running = now + every_s, hand.submit(soak.act, next(turns))
            if now >= began + line * LINE_S:
                report.line(line)
                line += 1
            time.sleep(0.2)
        running.result()


def run(root: Path, *, minutes: float, num_adapters: int, at_once: int) -> tuple[str, bool]:
    """A summary, and whether all is well."""
    names = [f"adapter-{number:02}" for number in range(num_adapters)]
    spare = [f"spare-{number}" for number in range(5)]
    changes = {**ENDPOINT, "adapters": [{"artifact": one, "stage": "production"} for one in ("adapter-*", "spare-*")]}
    job = make_job(root, [*names, *spare], **changes)
    with serve(job) as service:
        texts = ask(service.url, [*names, *spare], max_tokens=MAX_TOKENS)
        assert len(set(texts.values())) == len(texts), "else nothing would tell adapters apart"
        known = dict(enumerate(texts.values(), 1))
        versions = {name: Versions([(time.monotonic(), texts[name])]) for name in names}
        told, before = Soak(root, service, job, known, versions), memory(job)
        with Load(service.url, names, at_once=at_once, max_tokens=MAX_TOKENS) as load:
            report = Report(told, load)
            go_on(told, report, minutes=minutes)
        report.count()
        total, after = report.total, memory(told.job)
    well = not total.lost and not total.wrong and total.broken <= told.killed * job.engine.max_batch_size
    for one in (*total.lost, *total.wrong)[:10]:
        print(f"{one.model}: {one.error or one.text!r}", flush=True)
    done = ", ".join(f"{told.done.count(name)} x {name}" for name in dict.fromkeys(told.done))
    return f"in all: {total.line()}; {done}\nbefore: {before}\nafter: {after}", well


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--at-once", type=int, default=2, help="clients")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"`{shlex.join(['lmray', 'bench', 'soak', *sys.argv[1:]])}`\n{describe(1)}\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, local_ray(Path(folder) / "home"):
        root = Path(folder) / "soak"
        root.mkdir()
        summary, well = run(root, minutes=asked.minutes, num_adapters=asked.adapters, at_once=asked.at_once)
    print(summary, flush=True)
    raise SystemExit(not well)


if __name__ == "__main__":
    main()
