"""The port between a program and whatever runs it: a process, a Ray Train worker, a Ray Tune trial.

A program knows this protocol and nothing of Ray. `LocalContext` runs it in this process and keeps its run folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from lmray.artifacts.checkpoints import checkpoint_name, commit, newest_good, remove_old, tidy
from lmray.artifacts.files import seal
from lmray.artifacts.patience import Patience, passing
from lmray.metrics.events import EventLog

T = TypeVar("T")
Wish = Literal["go on", "save", "stop"]


class RunContext(Protocol):
    """What a program may ask of its surroundings. One per process; `rank` is the process, not LoRA's rank."""

    rank: int
    world_size: int
    device: str
    """A torch device: `cpu`, `cuda:0`."""
    threads: int
    """CPU threads this process may use."""
    folder: Path
    """The run folder, the same path on every rank."""
    scratch: Path
    """A folder of this process's own; gone after the run."""
    patience: Patience
    """What the program does its own writes with."""

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records `metrics` of optimizer step `step`."""
        ...

    def commit(
        self, step: int, checkpoint: Path, *, before: Callable[[], object] = lambda: None, **facts: str | int
    ) -> None:
        """Seals the folder `checkpoint`, this rank's part of one, with `facts`, and returns once the parts of all ranks
        are committed as one: a process killed after the call finds it in `resume_from`. What was reported up to `step`
        is on disk before that, and `before` is done, on rank 0, where it may be done again. One at a time; a thread of
        its own may commit beside all other calls. Raises CheckpointError, the same on every rank."""
        ...

    def wish(self) -> Wish:
        """What the run's surroundings want of the next step, the same on all ranks, which ask together: `save` commits
        it and goes on, for a machine is about to be taken away; `stop` commits it and ends."""
        ...

    def asked_to_stop(self) -> bool:
        """Whether this rank knows of such a request; asks no other rank."""
        ...

    def resume_from(self) -> Path | None:
        """The last committed checkpoint's folder, or None at a fresh start."""
        ...

    def begin_attempt(self, step: int) -> None:
        """The run goes on after `step`: the event log drops what was reported beyond it, which was never committed. All
        ranks ask together, once."""
        ...

    def agreed(self, act: Callable[[], T]) -> T:
        """What `act` gives or raises on rank 0, where alone it is done, on every rank."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """An LmrayError that a block raises on one rank is raised on every rank at the block's end: a rank that went on
        alone would wait for the others for ever."""
        ...


@dataclass(frozen=True)
class Result:
    """How a run ended: what `lmray run --json` prints."""

    status: str
    """`succeeded`, `failed`, `stopped` or `already-done`."""
    run: str
    """The run folder."""
    artifact: str | None = None
    """`NAME@VERSION` of what was kept, if anything was."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)
    """What a kind of job adds: trials of a sweep, the address of an endpoint; JSON types only."""

    def to_json(self) -> dict[str, Any]:
        head = {"status": self.status, "run": self.run, "artifact": self.artifact, "metrics": dict(self.metrics)}
        return head | {"seconds": round(self.seconds, 3)} | ({"details": dict(self.details)} if self.details else {})


class LocalContext:
    """Runs a program in this process: one rank, the only writer of `folder`; checkpoints are committed by renaming."""

    rank: int = 0
    world_size: int = 1
    _make_checkpoint = staticmethod(commit)

    def __init__(
        self,
        folder: Path,
        *,
        scratch: Path,
        device: str = "cpu",
        threads: int = 1,
        stop: Callable[[], bool] = lambda: False,
        warned: Callable[[], bool] = lambda: False,
        patience: Patience | None = None,
    ):
        self.folder, self.scratch, self.device, self.threads = folder, scratch, device, threads
        self._stop, self._warned = stop, warned
        self.patience = patience or Patience()
        folder.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(parents=True, exist_ok=True)
        self._events = EventLog(folder / "events.jsonl")
        self._last: Path | None = None
        self._away = False

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Steps need no store. Lines that cannot be written wait for the next; a kill that loses them loses nothing,
        for without a checkpoint their steps are done again."""
        self._events.add(step, metrics)
        try:
            self._events.flush()
        except OSError as error:
            trouble = passing(error)
            if trouble is None:
                raise
            if not self._away:
                self.patience.say(f"writing {self._events.path} failed: {trouble}; training goes on, its lines wait")
            self._away = True
        else:
            if self._away:
                self.patience.say(f"writing {self._events.path}: done, no line is missing")
            self._away = False

    def commit(
        self, step: int, checkpoint: Path, *, before: Callable[[], object] = lambda: None, **facts: str | int
    ) -> None:
        self._seal(step, checkpoint, facts)
        self._keep(step, checkpoint, before)

    def _seal(self, step: int, checkpoint: Path, facts: Mapping[str, str | int]) -> None:
        hint = f"{self.scratch} needs room for a checkpoint; {self.standing()}"
        self.patience(f"writing {checkpoint}", lambda: seal(checkpoint, step=step, **facts), hint=hint)

    def _keep(self, step: int, checkpoint: Path, before: Callable[[], object]) -> None:
        name = self.folder / checkpoint_name(step)

        def write() -> None:
            # Events first: one without its checkpoint is dropped at the resume, a checkpoint without its event is a
            # gap.
            self._events.flush(durable=True)
            before()
            self._make_checkpoint(checkpoint, self.folder, step)
            self._away = False  # Patience has said so

        self.patience(f"writing {name}", write, hint=self.standing())
        self._last = name
        try:
            remove_old(self.folder)
        except OSError:  # nothing is lost by what stays; the next checkpoint or the next start removes it
            return

    def standing(self) -> str:
        """What is safe, as the hint of an error that ends the run."""
        safe = f"{self._last} is good" if self._last else "there is no checkpoint yet"
        return f"{safe}; once {self.folder} can be written again, the same command goes on from there"

    def wish(self) -> Wish:
        if self.asked_to_stop():
            return "stop"
        return "save" if self._warned() else "go on"

    def asked_to_stop(self) -> bool:
        try:
            return self._stop()
        except OSError:  # the store is away: nobody can have asked
            return False

    def resume_from(self) -> Path | None:
        def found() -> Path | None:
            tidy(self.folder)
            return newest_good(self.folder, self.patience.say)

        self._last = self.patience(f"reading {self.folder}", found, hint=self.standing())
        self._events = EventLog(self._events.path)  # what an attempt before this one could not write is done again
        return self._last

    def begin_attempt(self, step: int) -> None:
        events = self._events

        def begin() -> None:
            events.begin_attempt(step, world_size=self.world_size)

        self.agreed(lambda: self.patience(f"writing {events.path}", begin, hint=self.standing()))

    def agreed(self, act: Callable[[], T]) -> T:
        return act()

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()
