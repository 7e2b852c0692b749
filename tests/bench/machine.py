"""What a benchmark ran on: the processor, and how fast it multiplies."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch


def describe(threads: int) -> str:
    """One line for the results."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    peak = ", ".join(f"{kind} GEMM {gemm_flops(kind, threads) / 1e9:,.0f} GFLOP/s" for kind in ("float32", "bfloat16"))
    return f"{name}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}: {peak}"


def gemm_flops(dtype: str, threads: int, *, size: int = 2048, seconds: float = 1.0) -> float:
    """FLOP/s of a square product, the best of what fits into `seconds`."""
    torch.set_num_threads(threads)
    one = torch.randn(size, size, dtype=getattr(torch, dtype))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(one, one)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
