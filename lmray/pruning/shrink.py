"""The smaller model: what was removed is cut out of the weights, and a config says the sizes of what is left.

`uniform`: every layer is as wide, and the model is one of its own architecture. `padded`: layers are filled up with
zeros to the widest, which changes no number. A Llama whose heads do not divide its hidden width is written as a
Mistral without a window, which has the same tensors and the same forward pass: Llama's config refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MistralConfig

from lmray.errors import ConfigError
from lmray.pruning.structure import KINDS, Kind, Part, Structure, linear_in

Kept = Mapping[Kind, list[list[int]]]
"""By kind and layer, the units that are kept."""


def shrunk(model: Any, structure: Structure, kept: Kept) -> Any:
    """A new model of what is left of `model`, whose adapters are merged; its own weights stay as they are."""
    config = _config(model.config, structure, kept)
    with torch.device("meta"):
        smaller = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    smaller = smaller.to_empty(device="cpu")
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    names = {id(module): name for name, module in model.named_modules()}
    for number, layer in enumerate(structure.layers(model)):
        for kind in KINDS:
            for part in structure.layout[kind].parts:
                name = names[id(linear_in(layer, part.linear))]
                width = max(map(len, kept[kind]))
                for tensor in ("weight", "bias"):
                    if f"{name}.{tensor}" in state:
                        cut = _Cut(part, structure, kept[kind][number], width)
                        state[f"{name}.{tensor}"] = cut(state[f"{name}.{tensor}"])
    smaller.load_state_dict(state, assign=True)
    _copy_buffers(model, smaller)
    smaller.tie_weights()
    smaller.generation_config = deepcopy(model.generation_config)
    return smaller.eval()


class _Cut:
    """One side of a tensor without what was removed, filled up with zeros to `width` units."""

    def __init__(self, part: Part, structure: Structure, kept: list[int], width: int):
        self.axis = 0 if part.side == "rows" else 1
        self.places = structure.sizes.places(part, kept)
        self.total = len(structure.sizes.places(part, list(range(width))))

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.axis == 1 and tensor.dim() == 1:  # the bias of outputs, of which none is removed
            return tensor
        cut = tensor.index_select(self.axis, self.places)
        missing = self.total - len(self.places)
        if missing:
            shape = list(cut.shape)
            shape[self.axis] = missing
            cut = torch.cat([cut, cut.new_zeros(shape)], dim=self.axis)
        return cut.contiguous()


def _config(config: Any, structure: Structure, kept: Kept) -> Any:
    sizes = structure.sizes
    groups, blocks = (max(map(len, kept[kind])) for kind in KINDS)
    widest = max(len(sizes.places(Part("", "rows", "channel"), units)) for units in kept["channels"])
    changes = {
        "num_key_value_heads": groups,
        "num_attention_heads": groups * sizes.heads_per_group,
        "head_dim": sizes.head_dim,
        "intermediate_size": max(widest, len(sizes.places(Part("", "rows", "channel"), list(range(blocks))))),
    }
    facts = {**config.to_dict(), **changes}
    if config.model_type == "llama" and sizes.hidden % changes["num_attention_heads"]:
        if config.attention_bias or config.mlp_bias:
            heads = changes["num_attention_heads"]
            found = f"leaves {heads} heads, which do not divide the hidden width {sizes.hidden}"
            raise ConfigError("method.remaining", f"{found}: no class of transformers has such a model with biases")
        facts = {name: value for name, value in facts.items() if name not in ("model_type", "architectures")}
        return MistralConfig(**facts, sliding_window=None, architectures=["MistralForCausalLM"])
    return type(config)(**facts)


def _copy_buffers(model: Any, smaller: Any) -> None:
    """What is in no state dict, like rotary frequencies."""
    for name, buffer in model.named_buffers():
        owner, _, last = name.rpartition(".")
        module = smaller.get_submodule(owner)
        module.register_buffer(last, buffer.detach().clone(), persistent=last not in module._non_persistent_buffers_set)
