"""A sharded model's part of a checkpoint, by `torch.distributed.checkpoint`: trained weights and optimizer state,
written by every rank for itself, read at any world size, also into a model that is not sharded.

`.metadata` in it is a pickle: read only from a run's own checkpoint whose manifest has been checked.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lmray.errors import CheckpointError
from lmray.sharding._optimizer_state import optimizer_tensors, set_optimizer_tensors

SHARDS = "shards"
"""Folder in a checkpoint."""


def save_shards(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes this rank's part into `folder`, which may be each rank's own; called on all ranks together."""
    optimizer_state = {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}
    dcp.save({**_weights(model), **optimizer_state}, checkpoint_id=folder / SHARDS)


@torch.no_grad()
def load_shards(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Sets model and optimizer to what the ranks of any number saved; called on all ranks together. Raises
    CheckpointError where other weights are trained."""
    path = folder / SHARDS
    if not path.is_dir():
        hint = "go on with the `sharding` and the number of workers it was saved with"
        raise CheckpointError(str(folder), "was not saved by `fsdp2`", hint=hint)
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    kept = {name: facts for name, facts in stored.items() if isinstance(facts, TensorStorageMetadata)}
    weights = _weights(model)
    found = {name: tuple(facts.size) for name, facts in kept.items() if name.startswith("model.")}
    expected = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != expected:
        odd = sorted(set(found.items()) ^ set(expected.items()))[0]
        raise CheckpointError(
            str(path), f"holds other parameters than the job trains, first at {odd[0]} {list(odd[1])}"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {name: _room(name, facts, parameters) for name, facts in kept.items() if name.startswith("optimizer.")}
    dcp.load({**weights, **state}, checkpoint_id=path)
    named = {name.removeprefix("optimizer."): tensor for name, tensor in state.items()}
    set_optimizer_tensors(optimizer, named, str(path))


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {f"model.{name}": parameter.detach() for name, parameter in named if parameter.requires_grad}


def _room(name: str, facts: TensorStorageMetadata, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """A tensor for the state `optimizer.INDEX.KEY` to be read into: laid out as its parameter where it is as large."""
    _, index, *_ = name.split(".")
    dtype = facts.properties.dtype
    if index.isdigit() and int(index) < len(parameters) and parameters[int(index)].shape == facts.size:
        return torch.zeros_like(parameters[int(index)], dtype=dtype)
    return torch.zeros(facts.size, dtype=dtype)
