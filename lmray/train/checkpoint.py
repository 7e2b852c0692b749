"""A checkpoint: trained weights, optimizer, random states and place in the data; the manifest is written last.

Every rank writes its part into a scratch folder of its own; the context makes one committed folder of them. It is
safetensors and JSON, but for what a sharded model writes, which is read only once the manifest's digests are checked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lmray.adapters.base import Adapter
from lmray.artifacts.files import read_sealed, write_json
from lmray.context import RunContext
from lmray.errors import ArtifactError, CheckpointError
from lmray.methods.base import Companion
from lmray.models.tensors import save_tensors
from lmray.sharding.base import Placed

ADAPTER, COMPANION = "adapter.safetensors", "companion.safetensors"
Write = Callable[[Callable[[], object]], object]
"""Does something again while the disk is full or away. For writes alone: a rank that did again what ranks do together
would wait for the others."""
STEP_BITS = 20
"""Seeds of ranks differ below this bit, those of steps from it on."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    run_key: str
    step: int
    """Optimizer steps done."""
    samples: int
    """Rows seen: the place in the sampler's stream."""
    seconds: float
    """Time spent training, all attempts that led here together."""
    watch: Mapping[str, Any] = field(default_factory=dict)
    """State of the run's `Watch`."""


def save_checkpoint(
    folder: Path,
    progress: Progress,
    placed: Placed,
    adapter: Adapter,
    ctx: RunContext,
    *,
    write: Write,
    companion: Companion | None = None,
) -> None:
    """Writes this rank's part of a checkpoint into `folder` anew, for `RunContext.commit` to seal; called on all ranks
    together."""

    def placed_part() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        placed.save(folder)

    def rest() -> None:
        save_tensors(_random_state(), folder / _random_file(ctx.rank))
        if ctx.rank == 0:
            save_tensors(adapter.resume_state(placed.model), folder / ADAPTER)
            if companion is not None:
                save_tensors(companion.state(), folder / COMPANION)
            write_json(folder / "progress.json", asdict(progress))

    if placed.saves_alone or ctx.world_size == 1:
        write(placed_part)
    else:  # done by all ranks together: where it fails on one, their attempt ends
        placed_part()
    write(rest)


def save_weights(folder: Path, placed: Placed, adapter: Adapter, ctx: RunContext, *, write: Write) -> None:
    """Writes what the adapter keeps of the model into `folder`, on rank 0; called on all ranks together."""
    state = None if placed.whole else placed.gathered_state(trained_only=adapter.kept == "adapter")
    if ctx.rank == 0:
        write(lambda: adapter.save(placed.model, folder, state=state))


def load_checkpoint(
    folder: Path,
    run_key: str,
    placed: Placed,
    adapter: Adapter,
    ctx: RunContext,
    *,
    companion: Companion | None = None,
) -> Progress:
    """Sets model, optimizer, companion and random state to those in `folder`; called on all ranks together. Raises
    CheckpointError where a file is missing or not what the manifest says, or the checkpoint is another run's or another
    strategy's."""
    ctx.agreed(lambda: _check(folder, run_key))
    progress = Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
    placed.load(folder)
    adapter.resume(placed.model, load_file(folder / ADAPTER), step=progress.step)
    if companion is not None:
        companion.load(load_file(folder / COMPANION))
    _set_random_state(folder / _random_file(ctx.rank), step=progress.step)
    return progress


def _check(folder: Path, run_key: str) -> None:
    try:
        manifest = read_sealed(folder)
    except ArtifactError as error:
        raise CheckpointError(
            error.where, error.found, hint="remove this checkpoint; the run goes on from the one before"
        ) from None
    if manifest["run_key"] != run_key:
        raise CheckpointError(
            str(folder), "belongs to another run", allowed=run_key[:12], hint="give the job another name"
        )


def _random_file(rank: int) -> str:
    return f"rng-{rank:05d}.safetensors" if rank else "rng.safetensors"


def _random_state() -> dict[str, torch.Tensor]:
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _set_random_state(path: Path, *, step: int) -> None:
    """A rank that the run did not have at this step begins a stream of its own: the one its seed began with was drawn
    from in the first steps."""
    if not path.is_file():
        torch.manual_seed(torch.initial_seed() + (step << STEP_BITS))
        return
    state = load_file(path)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
