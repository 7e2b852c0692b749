"""Which number format a device computes fast in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting


def resolve_dtype(dtype: str, device: str) -> tuple[str, str]:
    """`auto` becomes `bfloat16` where the hardware multiplies in it, else `float32`; returns (dtype, reason)."""
    if dtype != "auto":
        return dtype, "as the job says"
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the GPU multiplies in bfloat16"
        return "float32", "the GPU does not multiply in bfloat16"
    if torch.cpu._is_amx_tile_supported():
        return "bfloat16", "the CPU has AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "bfloat16", "the CPU has AVX512-BF16"
    return "float32", "the CPU has neither AMX nor AVX512-BF16"


@contextmanager
def computing(model: torch.nn.Module) -> Iterator[None]:
    """Forward passes inside multiply in the type of the base weights, whatever the adapter's own weights are kept in.

    A bfloat16 base carries float32 adapter weights, so that small optimizer steps are not rounded away; without this,
    `peft` lifts every activation to float32 for the side path, which costs most of a step's time and memory.
    """
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    casting = disable_input_dtype_casting(model) if isinstance(model, PeftModel) else nullcontext()
    low = weight.dtype != torch.float32
    with casting if low else nullcontext(), torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=low):
        yield
