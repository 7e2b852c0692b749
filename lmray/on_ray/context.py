"""The run context inside a Ray Train worker: events to the run folder, checkpoints committed before `report`
returns."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import ray.train
from ray.train import Checkpoint, CheckpointConsistencyMode

from lmray.context import checkpoint_name
from lmray.errors import CheckpointError
from lmray.metrics.events import EventLog

STOP = "stop"
"""A file of this name in the run folder asks all workers to save and end."""


class RayContext:
    """One Ray Train worker's `RunContext`."""

    def __init__(self, folder: Path, *, device: str, threads: int):
        place = ray.train.get_context()
        self.rank, self.world_size = place.get_world_rank(), place.get_world_size()
        self.folder, self.device, self.threads = folder, device, threads
        self.scratch = Path(tempfile.mkdtemp(prefix="lmray-"))
        self._events = EventLog(folder / "events.jsonl")

    def report(self, step: int, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        if self.rank == 0:  # before the checkpoint, as in LocalContext
            self._events.append(step, metrics)
        if checkpoint is not None:
            name = checkpoint_name(step)
            ray.train.report(
                {"step": step, **metrics}, checkpoint=Checkpoint(str(checkpoint)), checkpoint_dir_name=name
            )
            self._commit(name)

    def _commit(self, name: str) -> None:
        """`report` returns before the controller has registered the upload; a rank that dies in between would orphan
        it."""
        committed = ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
        if not any(Path(reported.checkpoint.path).name == name for reported in committed):
            raise CheckpointError(
                str(self.folder / name), "was reported but not committed", hint="see the Ray Train log"
            )

    def should_stop(self) -> bool:
        return (self.folder / STOP).exists()

    def resume_from(self) -> Path | None:
        checkpoint = ray.train.get_checkpoint()
        return Path(checkpoint.path) if checkpoint else None

    def close(self) -> None:
        """Removes the scratch folder."""
        shutil.rmtree(self.scratch, ignore_errors=True)
