"""AdamW whose running means take eight bits a number, through `bitsandbytes`.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.
Differs from the paper in: nothing.
"""

from __future__ import annotations

from lmray.optim._bitsandbytes import Bitsandbytes, eight_bit_means_bytes
from lmray.optim.base import Shapes


class Adamw8bit(Bitsandbytes):
    """AdamW in a quarter of the memory."""

    library_class = "AdamW8bit"

    def state_bytes(self, shapes: Shapes) -> int:
        return eight_bit_means_bytes(shapes)
