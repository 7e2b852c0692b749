"""Weights & Biases: a run of a project there, or kept in the run folder for `wandb sync`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lmray.trackers.base import Session, TrackedRun, Tracker


class Wandb(Tracker):
    """A run in a project at Weights & Biases. The key comes from `WANDB_API_KEY` or `wandb login` on the worker."""

    package: ClassVar[str] = "wandb"

    project: str = "lmray"
    entity: str | None = None
    """The user or team that owns the project. Empty: whose key it is."""
    mode: Literal["online", "offline"] = "online"
    """`offline`: sends nothing; `wandb sync RUN_FOLDER/wandb/offline-run-*` does so later."""

    def open(self, run: TrackedRun, *, session_id: str | None, after: int) -> Session:
        import wandb

        # Metrics only: no console, no git state, no code leaves the machine.
        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
        opened = wandb.init(
            project=self.project,
            entity=self.entity,
            name=run.name,
            id=session_id,
            resume="allow" if session_id else None,
            dir=str(run.folder),
            config=dict(run.fields),
            mode=self.mode,
            reinit="create_new",
            settings=settings,
        )
        return _Session(opened)


class _Session:
    """What is logged is on disk when `log` returns; the library sends it from there."""

    def __init__(self, run: Any):
        self.id, self._run = run.id, run
        self.last_step = max(0, run.step - 1)  # the step it would give to the next

    def log(self, step: int, time_s: float, metrics: Mapping[str, float]) -> None:
        self._run.log({name.replace(".", "/", 1): value for name, value in metrics.items()}, step=step)

    def flush(self) -> None:
        pass  # the library has no such call

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "succeeded" else 1)
