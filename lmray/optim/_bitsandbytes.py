"""What the optimizers of `bitsandbytes` share, and what its eight-bit running means take.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, section 2: eight bits a number with a
scale for every block.
"""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch

from lmray.optim.base import Groups, OptimizerConfig, Shapes, decayed

SMALL = 4096
"""Parameters of fewer numbers keep float32."""
BLOCK = 256
"""Numbers that share a float32 scale."""
PAGES = "it pages its state out of a GPU's memory"
"""Why a paged one needs a GPU."""


class Bitsandbytes(OptimizerConfig):
    """An optimizer of the library."""

    packages = ("bitsandbytes",)
    library_class: ClassVar[str]
    """Its name in `bitsandbytes.optim`."""

    def make_optimizer(self, groups: Groups, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        from bitsandbytes import optim  # type: ignore[import-not-found]

        return getattr(optim, self.library_class)(decayed(groups, weight_decay), lr=learning_rate)


def eight_bit_means_bytes(shapes: Shapes) -> int:
    """Of two running means of parameters of `shapes`, as AdamW has them."""
    return 2 * sum(4 * size if size < SMALL else size + 4 * -(-size // BLOCK) for size in map(prod, shapes))
