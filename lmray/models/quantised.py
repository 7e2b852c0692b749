"""Frozen weights in 4 or 8 bits, over the `bitsandbytes` library, for adapters to be trained beside them.

`nf4`: 4-bit NormalFloat in blocks of 64 with double quantisation (Dettmers et al., "QLoRA", arXiv 2305.14314, section
3). `int8`: one scale a row, outlying activations multiplied in 16 bits (Dettmers et al., "LLM.int8()", arXiv
2208.07339). Embeddings, norms and the head stay as they are; norms compute in float32 whatever their type.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from lmray.errors import ConfigError

BLOCK = 64
"""Weights that share one scale in NF4."""
MADE_WHOLE = ("mxfp4", "fp8")
"""Methods whose weights `transformers` turns into bfloat16 where it lacks the kernels for them."""
SCALES = 256
"""Blocks whose scales share one scale again."""


def quantization_config(quantization: str, dtype: str) -> BitsAndBytesConfig:
    """How `transformers` is to quantise a model that computes in `dtype`. Raises ConfigError without the library."""
    check_library()
    # It tells of every product that its inputs are cast, which is how LLM.int8() works.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def keep_layout(model: torch.nn.Module) -> None:
    """Has `bitsandbytes` compute with 4-bit weights as they lie. On CPUs with AVX512-BF16 it would lay them out anew in
    evaluation, for good: they then compute in bfloat16 and pass no gradient on."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def check_library() -> None:
    """Raises ConfigError where `bitsandbytes` is not installed."""
    if find_spec("bitsandbytes") is None:
        hint = "pip install 'lmray[quant]'"
        raise ConfigError("model.quantization", "needs the library `bitsandbytes`, which is not here", hint=hint)


def check_unquantised(config: Any, folder: Path, *, where: str = "model.source") -> None:
    """Raises ConfigError where the weights in `folder`, which `config` is of, were quantised before they were saved, in
    a form that `transformers` does not make whole again: they would be planned for as if they were whole."""
    inner = getattr(config.get_text_config(), "quantization_config", None)
    given = getattr(config, "quantization_config", None) or inner
    told = given if isinstance(given, dict) or given is None else given.to_dict()
    if not told or told.get("quant_method") in MADE_WHOLE:
        return
    found = f"the weights in {folder} were quantised before they were saved ({told.get('quant_method', 'unknown')})"
    hint = "name the model that it was made from; `model.quantization: nf4` quantises it as it is read"
    raise ConfigError(where, found, hint=f"{hint}; `engine: vllm` serves it as it is")


def check_quantised(model: PreTrainedModel, quantization: str) -> None:
    """Raises ConfigError where `model`, whose weights need not be loaded, cannot be quantised here."""
    check_library()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    saved_bytes(model, quantization, {id(end.weight) for end in ends if end is not None})


def saved_bytes(model: torch.nn.Module, quantization: str, ends: Collection[int]) -> int:
    """What quantising `model` saves of its weights; `ends` are the ids of the embedding's and the head's, which stay.
    Raises ConfigError where a layer's width does not divide into NF4's blocks."""
    saved = 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or id(module.weight) in ends:
            continue
        if quantization == "nf4" and module.in_features % BLOCK:
            found = f"`nf4` has blocks of {BLOCK} weights, and `{name}` has {module.in_features} inputs"
            raise ConfigError("model.quantization", found, allowed="int8, null")
        saved += module.weight.nbytes - _bytes(module, quantization)
    return saved


def _bytes(linear: torch.nn.Linear, quantization: str) -> int:
    count = linear.weight.numel()
    if quantization == "int8":
        return count + 4 * linear.out_features
    blocks = count // BLOCK
    return count // 2 + blocks + 4 * -(-blocks // SCALES)
