"""Which rows each optimizer step sees: one endless shuffled stream, so that a place in it is one number of samples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch


@dataclass(frozen=True)
class Sampler:
    """Rows 0 to `num_rows` - 1, shuffled anew each epoch; the order depends on `seed` and the epoch only, not on how
    many workers or micro-batches share a step."""

    num_rows: int
    seed: int

    def rows(self, start: int, stop: int) -> list[int]:
        """Rows of samples `start` to `stop` of the stream."""
        return [
            int(_order(self.num_rows, self.seed, place // self.num_rows)[place % self.num_rows])
            for place in range(start, stop)
        ]


@lru_cache(maxsize=4)
def _order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()  # torch's generator uses 32 bits of its seed only
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
    return torch.randperm(num_rows, generator=generator).numpy()
