"""AdamW whose float32 running means move between GPU and main memory as they are needed, through `bitsandbytes`.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3.
Differs from the paper in: state that a run was resumed with stays on the GPU.
"""

from __future__ import annotations

from lmray.optim._bitsandbytes import PAGES, Bitsandbytes
from lmray.optim.base import Shapes, num_parameters


class PagedAdamw32bit(Bitsandbytes):
    """AdamW, paged."""

    needs_gpu = PAGES
    library_class = "PagedAdamW32bit"

    def state_bytes(self, shapes: Shapes) -> int:
        return 8 * num_parameters(shapes)
