"""The run context inside a Ray Train worker: the run folder is kept as `LocalContext` keeps it, by rank 0.

Nothing is reported to Ray Train. Its own register of checkpoints would be a second truth: it takes up an upload some
time after `ray.train.report` returned, so a kill in between loses a checkpoint that is whole; and a register that a
kill cut off, or another version of Ray wrote, keeps a run from starting.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import ray.train
import ray.train.collective

from lmray.artifacts.files import only_writer
from lmray.artifacts.patience import Patience
from lmray.context import LocalContext
from lmray.errors import LmrayError
from lmray.on_ray.notices import say_to_driver

T = TypeVar("T")

STOP = "stop"
"""A file of this name in the run folder asks all workers to save and end."""
WRITER_LOCK = ".writer.lock"
"""Held by rank 0: the worker of a driver that was killed may outlive it by seconds."""
WRITER_WAIT_S = 120.0


class RayContext(LocalContext):
    """One Ray Train worker's `RunContext`."""

    def __init__(self, folder: Path, *, device: str, threads: int):
        super().__init__(
            folder,
            scratch=Path(tempfile.mkdtemp(prefix="lmray-")),
            device=device,
            threads=threads,
            stop=(folder / STOP).exists,
            patience=Patience(say=lambda text: say_to_driver(folder, text)),
        )
        place = ray.train.get_context()
        self.rank, self.world_size = place.get_world_rank(), place.get_world_size()
        self._held = ExitStack()

    def open(self) -> None:
        """Waits until no worker of an earlier attempt writes here. Raises CapacityError where one still does."""
        if self.rank == 0:
            self._held.enter_context(only_writer(self.folder, lock_name=WRITER_LOCK, wait_s=WRITER_WAIT_S))

    def report(self, step: int, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        if checkpoint is not None:
            self._agreed(lambda: LocalContext.report(self, step, metrics, checkpoint))
        elif self.rank == 0:
            super().report(step, metrics)

    def resume_from(self) -> Path | None:
        return self._agreed(super().resume_from)

    def _agreed(self, act: Callable[[], T]) -> T:
        """What `act` gives or raises on rank 0, on every rank, and not before it is done there."""
        if self.world_size == 1:
            return act()
        outcome: tuple[T | None, LmrayError | None] | None = None
        if self.rank == 0:
            try:
                outcome = act(), None
            except LmrayError as error:
                outcome = None, error
        value, error = ray.train.collective.broadcast_from_rank_zero(outcome)  # type: ignore[misc]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def close(self) -> None:
        """Removes the scratch folder and lets the next writer in."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._held.close()
