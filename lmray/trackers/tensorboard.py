"""TensorBoard: event files that `tensorboard --logdir STORE/runs` shows."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter

from lmray.trackers.base import Session, TrackedRun, Tracker


class Tensorboard(Tracker):
    """Event files in the run folder, or in a folder for all runs."""

    logdir: str | None = None
    """A folder that gets one of the run's name. Empty: `tensorboard` in the run folder."""

    def open(self, run: TrackedRun, *, session_id: str | None, after: int) -> Session:
        folder = Path(self.logdir).expanduser() / run.name if self.logdir else run.folder / "tensorboard"
        return _Session(folder, run, after=after, goes_on=session_id is not None)


class _Session:
    """Every session has a file of its own. A later one says from which step on it replaces what earlier ones wrote."""

    last_step = 0

    def __init__(self, folder: Path, run: TrackedRun, *, after: int, goes_on: bool):
        self.id = str(folder)
        # The library names files by second and host; they are read in the order of their names.
        suffix = f".{after:08d}-{secrets.token_hex(4)}"
        self._writer = SummaryWriter(self.id, purge_step=after + 1 if goes_on else None, filename_suffix=suffix)
        if not goes_on:
            self._writer.add_text("job", f"```yaml\n{run.job}\n```", 0)

    def log(self, step: int, time_s: float, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name.replace(".", "/", 1), value, step, walltime=time_s)  # a slash makes groups

    def flush(self) -> None:
        self._writer.flush()

    def finish(self, status: str) -> None:
        self._writer.close()
