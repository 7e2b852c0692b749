"""LoftQ: LoRA's A and B start from the best approximation of low rank to what quantising took from each weight.

Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659, algorithm 1.
Differs from the paper in: one iteration, T = 1, so that the quantised weights are those of every other job on this
model; the factors are divided by the scale that LoRA multiplies their product with.

Shapes: E outputs, I inputs, r rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight

from lmray.adapters._peft import HANDLE
from lmray.errors import ConfigError
from lmray.models.deferred import open_weights


@torch.no_grad()
def start_from_residuals(adapted: Any) -> None:
    """Sets A and B beside every 4-bit weight W of `adapted`, so that (alpha / r) B A is the nearest matrix of rank r to
    W - NF4(W). W is read from the folder that the model was loaded from, one weight at a time. Layers that are not
    quantised keep the factors they have. Raises ConfigError where none is quantised."""
    base = adapted.get_base_model()
    files = open_weights(Path(base.name_or_path))
    layers = {name: one for name, one in base.named_modules() if isinstance(one, LoraLayer)}
    quantised = {name: one for name, one in layers.items() if hasattr(one.get_base_layer().weight, "quant_state")}
    if not quantised:
        found = "`loftq` starts from what NF4 takes from the weights, and none is in 4 bits"
        raise ConfigError("adapter.init_lora_weights", found, hint="`init_lora_weights: true` starts beside any weight")
    for name, layer in quantised.items():
        weight: Any = layer.get_base_layer().weight
        original_EI = files[f"{name}.weight"].get_tensor(f"{name}.weight").to(weight.device, torch.float32)
        _approximate(layer, original_EI - dequantize_bnb_weight(weight).float())


def _approximate(layer: Any, residual_EI: torch.Tensor) -> None:
    """Sets A and B of `layer` to the largest singular values of `residual_EI`, their roots on either side; ranks beyond
    the smaller of its sides stay as they are, their update zero."""
    a_rI, b_Er = layer.lora_A[HANDLE].weight, layer.lora_B[HANDLE].weight
    left, values, right = torch.linalg.svd(residual_EI, full_matrices=False)
    kept = min(len(a_rI), len(values))
    roots = (values[:kept] / layer.scaling[HANDLE]).sqrt()
    a_rI[:kept] = roots[:, None] * right[:kept]
    b_Er[:, :kept] = left[:, :kept] * roots
