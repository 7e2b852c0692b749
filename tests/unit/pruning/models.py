"""Small models to cut, and what they say."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lmray.pruning.masks import Shape
from lmray.pruning.record import Counts, Kept, Pruning, record_of
from lmray.pruning.shrink import num_parameters, shrunk
from lmray.pruning.structure import Structure

PARENT = {"source": "親モデル", "revision": None, "digest": "d" * 64}
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


def save(model: Any, structure: Structure, kept: Kept, folder: Path, *, shape: Shape, asked: float = 0.6) -> Pruning:
    """What is left of `model` and its record, as a run keeps them."""
    smaller = shrunk(model, structure, kept, shape)
    counts = Counts(before=num_parameters(model), after=num_parameters(smaller))
    record = record_of(structure.sizes, kept, shape=shape, asked=asked, parent=PARENT, parameters=counts)
    smaller.save_pretrained(folder)
    record.save(folder)
    return record
