"""The run context inside a Ray Train worker: the run folder is kept as `LocalContext` keeps it, by rank 0.

Nothing is reported to Ray Train. Its own register of checkpoints would be a second truth: it takes up an upload some
time after `ray.train.report` returned, so a kill in between loses a checkpoint that is whole; and a register that a
kill cut off, or another version of Ray wrote, keeps a run from starting.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import ray.train

from lmray.artifacts.files import only_writer
from lmray.artifacts.patience import Patience
from lmray.on_ray.notices import say_to_driver
from lmray.on_ray.preemption import PreemptionNotice
from lmray.train.group import GroupContext

STOP = "stop"
"""A file of this name in the run folder asks all workers to save and end."""
WRITER_LOCK = ".writer.lock"
"""Held by rank 0: the worker of a driver that was killed may outlive it by seconds."""
WRITER_WAIT_S = 120.0


class RayContext(GroupContext):
    """One Ray Train worker's `RunContext`."""

    def __init__(self, folder: Path, *, device: str, threads: int):
        place = ray.train.get_context()
        patience = Patience(say=lambda text: say_to_driver(folder, text))
        super().__init__(
            folder,
            rank=place.get_world_rank(),
            world_size=place.get_world_size(),
            scratch=Path(tempfile.mkdtemp(prefix="lmray-")),
            device=device,
            threads=threads,
            stop=(folder / STOP).exists,
            warned=PreemptionNotice(patience.say),
            patience=patience,
        )
        self._held = ExitStack()

    def open(self) -> None:
        """Waits until no worker of an earlier attempt writes here. Raises CapacityError where one still does,
        ConfigError where the workers do not share the run folder."""
        self.agreed(
            lambda: self._held.enter_context(only_writer(self.folder, lock_name=WRITER_LOCK, wait_s=WRITER_WAIT_S))
        )
        self.check_shared()

    def close(self) -> None:
        """Removes the scratch folder and lets the next writer in."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._held.close()
