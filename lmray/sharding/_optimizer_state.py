"""An optimizer's state as named tensors, in the order of its parameters, which depends on the job alone.

`INDEX.KEY` is what a parameter carries (`3.exp_avg`), `group.INDEX.KEY` a number that a parameter group keeps count of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lmray.errors import CheckpointError

SET_BY_JOB = frozenset({"lr", "initial_lr", "lr_scale", "weight_decay"})


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of `optimizer`; tensors are its own, not copies."""
    content = optimizer.state_dict()
    named = {
        f"{index}.{key}": torch.as_tensor(value)
        for index, facts in content["state"].items()
        for key, value in facts.items()
    }
    for index, group in enumerate(content["param_groups"]):
        named |= {f"group.{index}.{key}": torch.tensor(value) for key, value in _counts(group, optimizer).items()}
    return named


def set_optimizer_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, torch.Tensor], where: str) -> None:
    """Sets the state of `optimizer` to what `optimizer_tensors` gave. Raises CheckpointError, with `where`, for one of
    other parameters."""
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    count = sum(len(group["params"]) for group in groups)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in named.items():
        place, _, key = name.rpartition(".")
        owner, _, index = place.rpartition(".")
        if int(index) >= (len(groups) if owner else count):
            raise CheckpointError(where, f"holds the state of other parameters, first at {name}")
        if owner:
            groups[int(index)][key] = tensor.item()
        else:
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _counts(group: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Numbers that are not what the group began with."""
    numbers = {key: value for key, value in group.items() if isinstance(value, (int, float)) and key not in SET_BY_JOB}
    return {key: value for key, value in numbers.items() if value != optimizer.defaults.get(key)}
