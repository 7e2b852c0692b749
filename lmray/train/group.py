"""The run context of processes that train together, over `torch.distributed`: rank 0 keeps the run folder as
`LocalContext` keeps it, every rank adds its part of a checkpoint, and all of them decide alike.

What the ranks agree on goes over gloo groups of its own: they work beside NCCL, and wait for a store that is away
without the model's collectives timing out. Commits have one to themselves: two threads cannot share a group.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lmray.artifacts.checkpoints import add_part, checkpoint_name, commit_parts, staging_for
from lmray.artifacts.files import temporary_beside
from lmray.context import LocalContext, Wish
from lmray.errors import ConfigError, LmrayError
from lmray.pulse import PULSE

T = TypeVar("T")

COLLECTIVE_TIMEOUT_S = 1860.0
"""Shortest time that a collective of the model waits."""
AGREEMENT_TIMEOUT = timedelta(hours=2)
"""How long a rank waits for the others' word: longer than anyone's patience with a store. A rank that died is noticed
at once."""


class GroupContext(LocalContext):
    """One process of a group that `torch.distributed` has set up; alone where `world_size` is 1."""

    def __init__(self, folder: Path, *, rank: int, world_size: int, **settings: Any):
        super().__init__(folder, **settings)
        self.rank, self.world_size = rank, world_size
        self._steps, self._commits = Agreement(rank, world_size), Agreement(rank, world_size)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.rank == 0:
            super().report(step, metrics)

    def commit(
        self, step: int, checkpoint: Path, *, before: Callable[[], object] = lambda: None, **facts: str | int
    ) -> None:
        staging = self._commits.agreed(lambda: staging_for(self.folder, step))
        with self._commits.together():
            self._seal(step, checkpoint, facts)
            self.patience(f"writing {staging}", lambda: add_part(checkpoint, staging, self.rank), hint=self.standing())
        self._commits.agreed(lambda: self._keep(step, staging, before))
        self._last = self.folder / checkpoint_name(step)

    def _make_checkpoint(self, source: Path, folder: Path, step: int) -> None:
        commit_parts(source, folder, step, num_parts=self.world_size)

    def wish(self) -> Wish:
        return self.agreed(super().wish)

    def resume_from(self) -> Path | None:
        self._last = self.agreed(super().resume_from)
        return self._last

    def check_shared(self) -> None:
        """Raises ConfigError, on every rank, where one does not see what rank 0 writes into the run folder: its parts
        of checkpoints would lie on a disk of its own."""
        name = self.agreed(lambda: self.patience(f"writing {self.folder}", self._probe, hint=self.standing()))
        try:
            with self.together():
                if not (self.folder / name).is_file():
                    found = f"worker {self.rank} on {platform.node()} does not see {self.folder} of worker 0"
                    raise ConfigError("storage", found, hint="put it on a path that all machines share")
        finally:
            self.agreed(lambda: self._remove(name))

    def _probe(self) -> str:
        probe = temporary_beside(self.folder / "shared")
        probe.touch()
        return probe.name

    def _remove(self, name: str) -> None:
        with suppress(OSError):  # what stays is a temporary file, which the next start removes
            (self.folder / name).unlink()

    def agreed(self, act: Callable[[], T]) -> T:
        return self._steps.agreed(act)

    def together(self) -> AbstractContextManager[None]:
        return self._steps.together()


class Agreement:
    """What the ranks do or hear alike, over a gloo group of its own; all of them make one, together."""

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size
        self._group: Any = dist.new_group(backend="gloo", timeout=AGREEMENT_TIMEOUT) if world_size > 1 else None

    def agreed(self, act: Callable[[], T]) -> T:
        """See `RunContext.agreed`."""
        outcome: list[tuple[T | None, LmrayError | None] | None] = [None]
        if self.rank == 0:
            outcome[0] = _tried(act)
        if self._group is not None:
            with PULSE.waiting("hearing rank 0"):
                dist.broadcast_object_list(outcome, src=0, group=self._group)
        value, error = outcome[0]  # type: ignore[misc]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """See `RunContext.together`."""
        mine: LmrayError | None = None
        try:
            yield
        except LmrayError as error:
            mine = error
        errors: list[LmrayError | None] = [mine] * self.world_size
        if self._group is not None:
            with PULSE.waiting("hearing all ranks"):
                dist.all_gather_object(errors, mine, group=self._group)
        for error in errors:
            if error is not None:
                raise error


def _tried(act: Callable[[], T]) -> tuple[T | None, LmrayError | None]:
    try:
        return act(), None
    except LmrayError as error:
        return None, error


@contextmanager
def torchrun_context(
    folder: Path, *, threads: int = 1, step_timeout_s: float | None = None, **settings: Any
) -> Iterator[GroupContext]:
    """The context of a process that `torchrun` started (it reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT); the process group ends with the block. NCCL on GPUs where there are any, gloo on CPUs.
    `step_timeout_s`: the job's, where it is longer than the default."""
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    join_process_group(device, step_timeout_s)
    try:
        with tempfile.TemporaryDirectory(prefix="lmray-") as scratch:
            context = GroupContext(
                folder,
                rank=dist.get_rank(),
                world_size=dist.get_world_size(),
                scratch=Path(scratch),
                device=device,
                threads=threads,
                **settings,
            )
            context.check_shared()
            yield context
    finally:
        dist.destroy_process_group()


def join_process_group(device: str, step_timeout_s: float | None) -> None:
    """Meets the other processes, whose model is on a device of the same kind, where the environment says: RANK,
    WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group(backend_for(device), timeout=collective_timeout(step_timeout_s))


def backend_for(device: str) -> str:
    """Both where the model is on a GPU: what is offloaded to the CPU is summed there."""
    return "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"


def collective_timeout(step_timeout_s: float | None) -> timedelta:
    """How long a collective of the model waits: longer than the watchdog (`lmray/train/hang.py`), which says more."""
    return timedelta(seconds=max(COLLECTIVE_TIMEOUT_S, (step_timeout_s or 0.0) + 60.0))
