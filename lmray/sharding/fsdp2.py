"""Weights, gradients and optimizer state are shared among the workers, block by block, through torch's `fully_shard`.

Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv 2304.11277, in its second form
(a DTensor a parameter). Every worker computes its share of the rows with one block's weights gathered at a time.
Differs from the paper in: gradients are summed, not averaged, for the learner divides by the tokens of all workers;
they are summed after every micro-batch, so that no worker ever holds those of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lmray.errors import ConfigError
from lmray.sharding._blocks import base_of, blocks_of
from lmray.sharding._ranks import agree, have_group, of_first, sum_over_ranks, sum_tensor
from lmray.sharding._state import load_state, save_shared, step_and_forget, trained_weights
from lmray.sharding.base import Fill, MakeOptimizer, Need, Part, Placed, Sharding


class Fsdp2(Sharding):
    """A share of the model on every worker."""

    divides: ClassVar[frozenset[Part]] = frozenset(get_args(Part))
    cpu_offload: bool = False
    """Shares of weights, gradients and optimizer state live in the CPU's memory, and the optimizer steps there."""
    reshard_after_forward: bool = True
    """Gathered weights are let go between forward and backward pass. Off: faster, but the backward pass begins with all
    of them in memory."""

    def resolve(self, *, workers: int, need: Need | None = None) -> tuple[Sharding, str]:
        return self, "as the job says"

    def place(
        self,
        model: torch.nn.Module,
        make_optimizer: MakeOptimizer,
        device: str,
        *,
        dtype: str = "float32",
        fill: Fill | None = None,
    ) -> Placed:
        have_group()
        kind = torch.device(device).type
        settings = {
            "mesh": init_device_mesh(kind, (dist.get_world_size(),)),
            "reshard_after_forward": self.reshard_after_forward,
            "mp_policy": _precision(dtype),
            "offload_policy": CPUOffloadPolicy(pin_memory=kind == "cuda") if self.cpu_offload else OffloadPolicy(),
        }
        if fill is None:  # cut from what each rank has: it must be of one
            agree(model)
        for module in (*_blocks(model), model):
            fully_shard(module, **settings)
        if fill is not None:
            fill(model, "cpu" if self.cpu_offload else device)
        _sum_gradients(model.modules())
        return _FsdpPlaced(model, make_optimizer(model), torch.device(device))


@dataclass
class _FsdpPlaced:
    whole: bool = field(default=False, init=False)
    saves_alone: bool = field(default=False, init=False)
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device

    def all_sum(self, value: float) -> float:
        return sum_over_ranks(value, self.device)

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return sum_tensor(tensor, self.device)

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        return of_first(tensor, self.device)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def clip_grad_norm(self, max_norm: float) -> float:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def apply(self, *, then: Callable[[], None] | None = None) -> None:
        step_and_forget(self.optimizer, then)

    def gathered_state(self, *, trained_only: bool = True) -> dict[str, torch.Tensor] | None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
        state: dict[str, Any] = get_model_state_dict(self.model, options=options)
        if dist.get_rank() != 0:
            return None
        kept = trained_weights(self.model, self.optimizer)
        return {name: tensor for name, tensor in state.items() if name in kept or not trained_only}

    def save(self, folder: Path) -> None:
        save_shared(self.model, self.optimizer, folder)

    def load(self, folder: Path) -> None:
        load_state(self.model, self.optimizer, folder)


def _blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    if not (blocks := blocks_of(model)):
        found = f"{type(base_of(model)).__name__} does not say which of its modules are blocks (`_no_split_modules`)"
        raise ConfigError("sharding", found, allowed="ddp, single")
    return blocks


def _precision(dtype: str) -> MixedPrecisionPolicy:
    """Gradients are summed in float32 whatever is computed in."""
    if dtype == "float32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)


def _sum_gradients(modules: Iterable[torch.nn.Module]) -> None:
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
