"""A checkpoint: adapter, optimizer, random state and place in the data; safetensors and JSON, manifest last.

Written by rank 0 into a scratch folder; the context commits that folder. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lmray.adapters.base import Adapter
from lmray.artifacts.files import read_sealed, seal, write_json
from lmray.errors import ArtifactError, CheckpointError
from lmray.models.tensors import save_tensors
from lmray.optim.base import load_optimizer, save_optimizer


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
    folder: Path, progress: Progress, model: torch.nn.Module, adapter: Adapter, optimizer: torch.optim.Optimizer
) -> None:
    """Writes a whole checkpoint into the empty or new `folder`."""
    adapter.save(model, folder / "adapter")
    save_optimizer(optimizer, folder)
    save_tensors({"cpu": torch.get_rng_state()}, folder / "rng.safetensors")
    write_json(folder / "progress.json", asdict(progress))
    seal(folder, step=progress.step, run_key=progress.run_key)


def load_checkpoint(
    folder: Path, run_key: str, model: torch.nn.Module, adapter: Adapter, optimizer: torch.optim.Optimizer
) -> Progress:
    """Sets model, optimizer and random state to those in `folder`. Raises CheckpointError where a file is missing or
    not what the manifest says, or the checkpoint is another run's."""
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
    adapter.load(model, folder / "adapter")
    load_optimizer(optimizer, folder)
    torch.set_rng_state(load_file(folder / "rng.safetensors")["cpu"])
    return Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
