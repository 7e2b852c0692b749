"""The run context of processes that train together, over `torch.distributed`: rank 0 keeps the run folder as
`LocalContext` keeps it, every rank adds its part of a checkpoint, and all of them decide alike.

What the ranks agree on goes over a gloo group of its own: it works beside NCCL, and waits for a store that is away
without the model's collectives timing out.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lmray.artifacts.checkpoints import add_part, checkpoint_name, commit_parts, staging_for
from lmray.context import LocalContext
from lmray.errors import LmrayError
from lmray.pulse import PULSE

T = TypeVar("T")

COLLECTIVE_TIMEOUT_S = 1860.0
"""Shortest time that a collective of the model waits."""
AGREEMENT_TIMEOUT = timedelta(hours=2)
"""How long a rank waits for the others' word: longer than anyone's patience with a store. A rank that died is noticed
at once."""


class GroupContext(LocalContext):
    """One process of a group that `torch.distributed` has set up; alone where `world_size` is 1."""

    _make_checkpoint = staticmethod(commit_parts)

    def __init__(self, folder: Path, *, rank: int, world_size: int, **settings: Any):
        super().__init__(folder, **settings)
        self.rank, self.world_size = rank, world_size
        self._agreement: Any = dist.new_group(backend="gloo", timeout=AGREEMENT_TIMEOUT) if world_size > 1 else None

    def report(self, step: int, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        if checkpoint is None:
            if self.rank == 0:
                super().report(step, metrics)
            return
        staging = self.agreed(lambda: staging_for(self.folder, step))
        with self.together():
            self.patience(f"writing {staging}", lambda: add_part(checkpoint, staging, self.rank), hint=self.standing())
        self.agreed(lambda: LocalContext.report(self, step, metrics, staging))
        self._last = self.folder / checkpoint_name(step)

    def should_stop(self) -> bool:
        return self.agreed(self.asked_to_stop)

    def resume_from(self) -> Path | None:
        self._last = self.agreed(super().resume_from)
        return self._last

    def agreed(self, act: Callable[[], T]) -> T:
        outcome: list[tuple[T | None, LmrayError | None] | None] = [None]
        if self.rank == 0:
            outcome[0] = _tried(act)
        if self._agreement is not None:
            with PULSE.waiting("hearing rank 0"):
                dist.broadcast_object_list(outcome, src=0, group=self._agreement)
        value, error = outcome[0]  # type: ignore[misc]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    @contextmanager
    def together(self) -> Iterator[None]:
        mine: LmrayError | None = None
        try:
            yield
        except LmrayError as error:
            mine = error
        errors: list[LmrayError | None] = [mine] * self.world_size
        if self._agreement is not None:
            with PULSE.waiting("hearing all ranks"):
                dist.all_gather_object(errors, mine, group=self._agreement)
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
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group(backend_for(device), timeout=collective_timeout(step_timeout_s))
    try:
        with tempfile.TemporaryDirectory(prefix="lmray-") as scratch:
            yield GroupContext(
                folder,
                rank=dist.get_rank(),
                world_size=dist.get_world_size(),
                scratch=Path(scratch),
                device=device,
                threads=threads,
                **settings,
            )
    finally:
        dist.destroy_process_group()


def backend_for(device: str) -> str:
    """Both where the model is on a GPU: what is offloaded to the CPU is summed there."""
    return "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"


def collective_timeout(step_timeout_s: float | None) -> timedelta:
    """How long a collective of the model waits: longer than the watchdog (`lmray/train/hang.py`), which says more."""
    return timedelta(seconds=max(COLLECTIVE_TIMEOUT_S, (step_timeout_s or 0.0) + 60.0))
