"""What strategies of several ranks share: sums over them, and a group where there is only one."""

from __future__ import annotations

import torch
import torch.distributed as dist


def have_group(device: str = "cpu") -> None:
    """Makes a process group of this process alone where none was set up."""
    if not dist.is_initialized():
        backend = "gloo" if torch.device(device).type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def sum_over_ranks(value: float, device: torch.device) -> float:
    """`value` summed in float64, the same on every rank."""
    if dist.get_world_size() == 1:
        return value
    summed = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.item()


def sum_tensor(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor`, wherever it lies, summed over all ranks, exchanged on `device`."""
    if dist.get_world_size() == 1:
        return tensor
    summed = tensor.detach().to(device, copy=True)
    dist.all_reduce(summed)
    return summed.to(tensor.device)


def of_first(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rank 0's `tensor`, exchanged on `device`."""
    if dist.get_world_size() == 1:
        return tensor
    shared = tensor.detach().to(device, copy=True)
    dist.broadcast(shared, src=0)
    return shared.to(tensor.device)


@torch.no_grad()
def agree(model: torch.nn.Module) -> None:
    """Gives every rank rank 0's weights: factors that start from a decomposition, and what it leaves of a weight,
    differ from machine to machine, and summed gradients would be of none of them. Quantised weights, of which nothing
    is decomposed, stay as they are."""
    if dist.get_world_size() == 1:
        return
    for parameter in model.parameters():
        if parameter.is_floating_point():
            dist.broadcast(parameter, src=0)
