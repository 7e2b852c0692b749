"""Small models to cut, and what they say."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

IDS = torch.randint(1, 97, (2, 21), generator=torch.Generator().manual_seed(0))


def make(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights, none of them zero, not even biases and norms."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.max_new_tokens = 17
    return model.to(dtype).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits
