"""Which number format a device computes fast in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer


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
    """Forward passes inside multiply in the type that the model was loaded in, whatever trained weights are kept in.

    What is trained of a bfloat16 model is kept in float32, so that small optimizer steps are not rounded away; without
    this, `peft` lifts every activation to float32 for the side path, which costs most of a step's time and memory.
    """
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    casting = disable_input_dtype_casting(model) if _casts_inputs(model) else nullcontext()
    low = compute_dtype(model) != torch.float32
    with casting if low else nullcontext(), torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=low):
        yield


def _casts_inputs(model: torch.nn.Module) -> bool:
    """Whether the layers of an attached adapter lift their inputs to the type of its weights; not every kind's do."""
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    return isinstance(model, PeftModel) and hasattr(layer, "cast_input_dtype_enabled")


def compute_dtype(model: Any) -> torch.dtype:
    """The type that `model` was loaded in and multiplies in."""
    weight = model.get_input_embeddings().weight
    stated = model.config.dtype if weight.dtype == torch.float32 else weight.dtype
    return stated if isinstance(stated, torch.dtype) else torch.float32


def stored_dtype(config: Any) -> torch.dtype:
    """The type that a model of `config` lies in."""
    return config.get_text_config().dtype or torch.float32


def round_weights(model: Any, dtype: torch.dtype) -> Any:
    """`model` with weights of `dtype`. Its buffers stay: rotary frequencies in bfloat16 would turn far positions by
    a wrong angle, and `from_pretrained` keeps them in float32, too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def keep_masters(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Keeps `parameters` in float32 from now on; `computing` goes on multiplying in the model's own type."""
    for parameter in parameters:
        parameter.data = parameter.data.float()
