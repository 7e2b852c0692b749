"""Lion: steps of one size, along the signs of a running mean of gradients, through `bitsandbytes`.

Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, algorithm 2. Its learning rates are
three to ten times smaller than AdamW's.
Differs from the paper in: nothing.
"""

from __future__ import annotations

from lmray.optim._bitsandbytes import Bitsandbytes
from lmray.optim.base import Shapes, num_parameters


class Lion(Bitsandbytes):
    """Sign steps in half of AdamW's memory."""

    library_class = "Lion32bit"

    def state_bytes(self, shapes: Shapes) -> int:
        return 4 * num_parameters(shapes)
