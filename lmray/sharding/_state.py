"""Trained weights and optimizer state on disk, in two forms that both kinds of model read at any world size.

Whole: `weights.safetensors` and the optimizer as `lmray.optim.base` writes it, by one rank. Shared: a folder of
`torch.distributed.checkpoint` to which every rank writes its part; its `.metadata` is a pickle, and read only from a
run's own checkpoint whose manifest has been checked. "Trained" is what the optimizer holds, whether or not it learns at
this step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.tensor import DTensor, distribute_tensor

from lmray.errors import CheckpointError
from lmray.models.tensors import check_same_shapes, save_tensors
from lmray.optim.base import load_optimizer, save_optimizer
from lmray.sharding._optimizer_state import optimizer_tensors, set_optimizer_tensors

WEIGHTS, SHARDS = "weights.safetensors", "shards"


def trained_weights(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    """By name, the parameters of `model` that `optimizer` holds."""
    held = {id(parameter) for parameter in _parameters(optimizer)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in held}


def step_and_forget(optimizer: torch.optim.Optimizer, then: Callable[[], None] | None) -> None:
    """A step, what comes `then`, and no gradients any more."""
    optimizer.step()
    if then is not None:
        then()
    optimizer.zero_grad(set_to_none=True)


def save_whole(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes what one rank holds whole."""
    save_tensors(trained_weights(model, optimizer), folder / WEIGHTS)
    save_optimizer(optimizer, folder)


def save_shared(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes this rank's part into `folder`, which is its own; called on all ranks together."""
    weights = {f"weights.{name}": one.detach() for name, one in trained_weights(model, optimizer).items()}
    state = {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}
    save_distributed({**weights, **state}, checkpoint_id=folder / SHARDS)


@torch.no_grad()
def load_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Sets model and optimizer to what any number of ranks saved in either form; called on all ranks together. Raises
    CheckpointError where other weights are trained, or another strategy saved them in a form of its own."""
    if (folder / SHARDS).is_dir():
        _load_shared(model, optimizer, folder / SHARDS)
    elif (folder / WEIGHTS).is_file():
        _load_whole(model, optimizer, folder)
    else:
        hint = "go on with the `sharding` it began with"
        raise CheckpointError(str(folder), "was saved by a strategy with a form of its own", hint=hint)


def _load_whole(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    weights, found = trained_weights(model, optimizer), load_file(folder / WEIGHTS)
    check_same_shapes(folder / WEIGHTS, found, weights)
    for name, parameter in weights.items():
        _local(parameter).copy_(_local(_laid_out(found[name], parameter)))
    parameters = _parameters(optimizer)

    def laid_out(index: int, value: Any) -> Any:
        return _laid_out(value, _owner(index, value.shape, parameters)) if isinstance(value, torch.Tensor) else value

    load_optimizer(optimizer, folder, laid_out)


def _load_shared(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    kept = {name: facts for name, facts in stored.items() if isinstance(facts, TensorStorageMetadata)}
    weights = {f"weights.{name}": one.detach() for name, one in trained_weights(model, optimizer).items()}
    found = {
        name: torch.empty(facts.size, device="meta") for name, facts in kept.items() if name.startswith("weights.")
    }
    check_same_shapes(path, found, weights)
    parameters = _parameters(optimizer)
    state = {
        name: _room(facts, _owner(_index(name), facts.size, parameters))
        for name, facts in kept.items()
        if name.startswith("optimizer.")
    }
    load_distributed({**weights, **state}, checkpoint_id=path)
    named = {name.removeprefix("optimizer."): tensor for name, tensor in state.items()}
    set_optimizer_tensors(optimizer, named, str(path))


def _room(facts: TensorStorageMetadata, like: torch.Tensor | None) -> torch.Tensor:
    """A tensor to be read into."""
    dtype = facts.properties.dtype
    return torch.zeros(facts.size, dtype=dtype) if like is None else torch.zeros_like(like, dtype=dtype)


def _index(name: str) -> int:
    """Of the parameter whose state `optimizer.INDEX.KEY` is; -1 for that of a group."""
    index = name.split(".")[1]
    return int(index) if index.isdigit() else -1


def _owner(index: int, size: torch.Size, parameters: list[torch.nn.Parameter]) -> torch.nn.Parameter | None:
    """The parameter number `index`, where its state is as large and so laid out alike."""
    return parameters[index] if 0 <= index < len(parameters) and parameters[index].shape == size else None


def _laid_out(tensor: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    """This rank's share of `tensor`, which every rank has read, where `like` is shared."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
