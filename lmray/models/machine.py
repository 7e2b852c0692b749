"""What a machine offers a worker: cores, memory, GPUs; and how fast it multiplies matrices."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much memory a container may use."""

ALLOCATORS = re.compile(
    r"DefaultCPUAllocator: can't allocate memory|^std::bad_alloc$|CUDA error: out of memory"
    r"|unable to mmap .*Cannot allocate memory"
)
"""What allocators say, and what maps files, that have no exception of their own."""
_M_MMAP_THRESHOLD = -3
"""Its number in glibc's malloc.h."""


@dataclass(frozen=True)
class Machine:
    """One machine, or one node of a cluster."""

    name: str
    cpus: float
    gpus: float
    memory_bytes: int
    gpu_memory_bytes: int | None = None
    """Of the smallest GPU; None where there is none, or it did not say."""

    def worker_bytes(self, *, on_gpu: bool) -> int | None:
        """What one worker's model lives in."""
        return self.gpu_memory_bytes if on_gpu else self.memory_bytes


def this_machine(limits: Sequence[str] = LIMITS) -> Machine:
    """The machine this process is on; the cores it may use, the memory its container may."""
    count = torch.cuda.device_count()
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(count)]
    memory = min([psutil.virtual_memory().total, *filter(None, map(_limit, limits))])
    return Machine(platform.node(), len(os.sched_getaffinity(0)), count, memory, min(sizes, default=None))


def _limit(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there was not memory enough, of the process or of a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ALLOCATORS.search(str(error)) is not None


def keep_few_products() -> None:
    """Bounds the code that oneDNN keeps for products of this process on CPUs, unless the user has. Each size has its
    own: by default up to 1,024 are kept, which take a gigabyte. To be called before the first product."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def map_large_tensors() -> None:
    """Has the C library map every block of 4 MiB and more on its own, unless a hole on its heap takes it, and give it
    back when it is freed; to be called before there are such holes. It begins with 128 KiB, and then learns from the
    blocks it sees to keep up to 32 MiB on its heap, in whose holes later tensors do not fit: two workers that shared
    all of a 135M model had up to a gigabyte of holes each, and so a quarter of that. Smaller bounds leave fewer holes,
    but mapping anew takes time: at 128 KiB there are none, and steps took half as long again. Does nothing but under
    glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 * 2**20)


def release_heap() -> None:
    """Gives freed memory back to the system. What converting a model's weights freed stays with the C library
    otherwise, in holes that a training step's larger tensors do not fill. Does nothing but under glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def measure_flops(dtype: str, device: str = "cpu", *, seconds: float = 0.5, size: int = 1024) -> float:
    """Floating point operations a second of square matrix products in `dtype`, over about `seconds`."""
    left = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    right = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    float((left @ right)[0, 0])  # warm: the first product loads kernels
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        float((left @ right)[0, 0])  # reading a number waits for the device
        count += 1
    return 2 * size**3 * count / spent
