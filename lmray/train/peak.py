"""How much memory this process needed at most."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peak_memory_bytes(device: str) -> dict[str, float]:
    """The process's largest resident memory so far, and on a GPU the most that tensors took there."""
    peaks: dict[str, float] = {"train.peak_memory_bytes": _peak_resident_bytes()}
    if device.startswith("cuda"):
        peaks["train.peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return peaks


def _peak_resident_bytes() -> int:
    """Linux's own counter where there is one: `getrusage` also counts what the process was forked from."""
    if _STATUS.is_file():
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
