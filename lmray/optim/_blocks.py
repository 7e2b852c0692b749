"""What `bitsandbytes` keeps of a parameter's running means: eight bits a number with a scale for every block.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, section 2.
"""

from __future__ import annotations

from math import prod

from lmray.optim.base import Shapes

SMALL = 4096
"""Parameters of fewer numbers keep float32."""
BLOCK = 256
"""Numbers that share a float32 scale."""


def block_bytes(shapes: Shapes, *, means: int) -> int:
    """Of so many running means of parameters of `shapes`."""
    sizes = map(prod, shapes)
    return means * sum(4 * size if size < SMALL else size + 4 * -(-size // BLOCK) for size in sizes)
