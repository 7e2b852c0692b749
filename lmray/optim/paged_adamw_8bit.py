"""AdamW whose eight-bit running means move between GPU and main memory as they are needed, through `bitsandbytes`.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3.
Differs from the paper in: state that a run was resumed with stays on the GPU.
"""

from __future__ import annotations

from lmray.optim._bitsandbytes import PAGES, Bitsandbytes, eight_bit_means_bytes
from lmray.optim.base import Shapes


class PagedAdamw8bit(Bitsandbytes):
    """AdamW in a quarter of the memory, paged."""

    needs_gpu = PAGES
    library_class = "PagedAdamW8bit"

    def state_bytes(self, shapes: Shapes) -> int:
        return eight_bit_means_bytes(shapes)
