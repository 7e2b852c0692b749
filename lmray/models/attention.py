"""Attention by example: rows of several examples cost what their examples cost, not the square of the row.

On a CPU, `transformers` gives a packed row one mask of (row x row) scores, most of them thrown away. Here a
micro-batch is one long row without padding, and each example attends to itself alone, causally, through
`transformers`' own SDPA function. Registered as `by_example` in `transformers`' attention interface; without `bounds`
it is plain SDPA.

Shapes: B rows (1 where bounds are given), H heads, T tokens, D head width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "by_example"


def attend_by_example(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    bounds: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention output (B, T, H, D). `bounds`: where examples start along T, and T itself at the end."""
    if bounds is None:
        return sdpa_attention_forward(module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **options)
    outputs = []
    for start, stop in pairwise(bounds):
        query, key, value = (tensor[:, :, start:stop] for tensor in (query_BHTD, key_BHTD, value_BHTD))
        outputs.append(sdpa_attention_forward(module, query, key, value, None, **options)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(NAME, attend_by_example)


def is_flat(model: Any) -> bool:
    """Whether `model` wants batches of one row with `bounds`."""
    return model.config._attn_implementation == NAME


def resolve_attention(wanted: str, device: str, config: Any, *, max_length: int) -> tuple[str, str]:
    """`auto` becomes `by_example` on CPUs, where every layer sees all of an example, else `sdpa`: (name, reason)."""
    if wanted != "auto":
        return wanted, "as the job says"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < max_length:
        return "sdpa", f"the model attends within a window of {window} tokens"
    if device == "cpu":
        return NAME, "on a CPU, packed examples cost only their own scores"
    return "sdpa", "the fused kernels of the GPU"
