"""The port between a program and whatever runs it: a process, a Ray Train worker, a Ray Tune trial.

A program knows this protocol and nothing of Ray. `LocalContext` runs it in this process and keeps its run folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lmray.artifacts.files import replace_folder
from lmray.metrics.events import EventLog

CHECKPOINTS_KEPT = 2
"""Older committed checkpoints of a run are removed."""


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

    def report(self, step: int, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        """Records `metrics` of optimizer step `step`. With `checkpoint`, returns once that folder is committed: a
        process killed after the call finds it in `resume_from`."""
        ...

    def should_stop(self) -> bool:
        """True once the run was asked to end early; the program saves and returns."""
        ...

    def resume_from(self) -> Path | None:
        """The last committed checkpoint's folder, or None at a fresh start."""
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


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps; sorts by step."""
    return f"checkpoint-{step:08d}"


class LocalContext:
    """Runs a program in this process: one rank, checkpoints committed by renaming them into `folder`."""

    rank, world_size = 0, 1

    def __init__(
        self,
        folder: Path,
        *,
        scratch: Path,
        device: str = "cpu",
        threads: int = 1,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.folder, self.scratch, self.device, self.threads, self._stop = folder, scratch, device, threads, stop
        folder.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(parents=True, exist_ok=True)
        self._events = EventLog(folder / "events.jsonl")

    def report(self, step: int, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        # The event first: one without its checkpoint is dropped at the resume, a checkpoint without its event is a gap.
        self._events.append(step, metrics)
        if checkpoint is not None:
            replace_folder(checkpoint, self.folder / checkpoint_name(step))
            for old in committed(self.folder)[:-CHECKPOINTS_KEPT]:
                shutil.rmtree(old)

    def should_stop(self) -> bool:
        return self._stop()

    def resume_from(self) -> Path | None:
        found = committed(self.folder)
        return found[-1] if found else None


def committed(folder: Path) -> list[Path]:
    """Checkpoint folders of a run that carry their manifest, oldest first."""
    return sorted(path for path in folder.glob("checkpoint-*") if (path / "manifest.json").is_file())
