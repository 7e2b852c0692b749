"""Checkpoints on their way from a rank's scratch folder into the run folder. Runs on every rank.

All ranks take a snapshot together, between two steps; a thread of each commits it beside the steps that follow. One
commit is under way at most: the next one, the end of the run, a stop and an error wait for it.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from lmray.artifacts.files import replace_folder
from lmray.context import RunContext
from lmray.pulse import PULSE
from lmray.train.checkpoint import Progress


@dataclass(frozen=True)
class Snapshot:
    """What one rank saved of a step."""

    folder: Path
    """This rank's part of the checkpoint is in its folder `checkpoint`; on rank 0 the step's weights are in `best`, if
    it is the best so far and those are to be kept."""
    progress: Progress

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def best(self) -> Path:
        return self.folder / "best"


def best_folder(folder: Path, step: int | None) -> Path:
    """Where the run in `folder` keeps the weights of its best step; where there is none, of no step."""
    return folder / f"best-{step or 0:08d}"


class Commits:
    """Commits snapshots, `beside` the caller or before `begin` returns; its thread ends with the block.

    An error is raised on all ranks together: by `look`, once rank 0 knows of it, by `begin`, or by the block's end.
    """

    def __init__(self, ctx: RunContext, *, beside: bool):
        self._ctx, self._beside = ctx, beside
        self._snapshots = ctx.scratch / "snapshots"
        self._folders = cycle(self._snapshots / str(turn) for turn in range(2 if beside else 1))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lmray-commit")
        self._under_way: Future[None] | None = None

    def __enter__(self) -> Commits:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self.wait()
            elif self._under_way is not None and (lost := self._under_way.exception()) is not None:
                self._ctx.patience.say(f"warning: the checkpoint under way was not committed: {lost}")
        finally:
            self._thread.shutdown()
            shutil.rmtree(self._snapshots, ignore_errors=True)

    def next_folder(self) -> Path:
        """Where the next snapshot is to be: not where that of the commit under way is."""
        return next(self._folders)

    def begin(self, snapshot: Snapshot) -> None:
        """Commits `snapshot` as soon as the commit before it is done. Raises what ended that one."""
        self.wait()
        self._under_way = self._thread.submit(self._commit, snapshot)
        if not self._beside:
            self.wait()

    def look(self) -> None:
        """Raises what ended the commit under way, if anything did; all ranks look together."""
        if self._under_way is not None and self._ctx.agreed(self._under_way.done):
            self.wait()

    def wait(self) -> None:
        """Returns once nothing is under way. Raises what ended it."""
        if self._under_way is None:
            return
        with PULSE.waiting("its commit"):
            self._under_way.exception()  # waits; interrupted here, it is still under way
        done, self._under_way = self._under_way, None
        done.result()

    def _commit(self, snapshot: Snapshot) -> None:
        ctx, progress = self._ctx, snapshot.progress
        best = best_folder(ctx.folder, progress.watch["best_step"])

        def keep_best() -> None:
            # Before the checkpoint that names it: what a committed checkpoint calls the best is always there.
            if snapshot.best.is_dir():
                replace_folder(snapshot.best, best)

        ctx.commit(progress.step, snapshot.checkpoint, before=keep_best, run_key=progress.run_key)
        if ctx.rank == 0:
            # Only after the commit: until then a resume may go back to where an older one was the best.
            for older in ctx.folder.glob("best-*"):
                if older != best:
                    shutil.rmtree(older, ignore_errors=True)
        shutil.rmtree(snapshot.folder, ignore_errors=True)
