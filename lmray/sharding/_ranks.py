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
