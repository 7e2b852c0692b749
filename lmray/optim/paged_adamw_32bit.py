"""AdamW whose float32 running means move between GPU and main memory as they are needed, through `bitsandbytes`.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3.
Differs from the paper in: state that a run was resumed with stays on the GPU.
"""

from __future__ import annotations

import torch

from lmray.optim.base import Groups, OptimizerConfig, Shapes, decayed, num_parameters


class PagedAdamw32bit(OptimizerConfig):
    """AdamW, paged."""

    packages = ("bitsandbytes",)
    needs_gpu = "it pages its state out of a GPU's memory"

    def make_optimizer(self, groups: Groups, *, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        from bitsandbytes.optim.adamw import PagedAdamW32bit  # type: ignore[import-not-found]

        return PagedAdamW32bit(decayed(groups, weight_decay), lr=learning_rate)

    def state_bytes(self, shapes: Shapes) -> int:
        return 8 * num_parameters(shapes)
